"use strict";

// The theme: the reader's system decides, until the button does.
const root = document.documentElement;
const theme = document.getElementById("theme");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
const name = () => { theme.textContent = dark() ? "Light theme" : "Dark theme"; };
theme.hidden = false;
theme.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; name(); });
name();

// What a cell is sorted by: the number that it begins with, before any interval; NaN where it is no number.
const number = (text) => Number(text.replace(/,(?=\d{3})| [[(].*/g, ""));

// Tables that sort by a column's button: by number where both cells have one, else by text.
for (const button of document.querySelectorAll("table.sortable th button")) {
  const header = button.parentElement;
  const body = header.closest("table").tBodies[0];
  button.addEventListener("click", () => {
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of header.parentElement.children) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[header.cellIndex].textContent;
    const compare = (a, b) => {
      const [x, y] = [number(key(a)), number(key(b))];
      const order = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x - y;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}

// Fields that leave only the rows that hold what is typed.
for (const field of document.querySelectorAll("input[data-filters]")) {
  const table = document.getElementById(field.dataset.filters);
  if (!table) continue;  // which has no rows
  const rows = table.tBodies[0].rows;
  const count = field.closest("p").querySelector("output");
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted);
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length}`;
  });
  field.closest("p").hidden = false;
}

// Fields that leave only the rows with the chosen values in their columns, which need not be shown then.
for (const box of document.querySelectorAll("[data-switches]")) {
  const table = document.getElementById(box.dataset.switches);
  const choices = [...box.querySelectorAll("select")];
  for (const row of table.rows) for (const choice of choices) row.cells[choice.dataset.column].hidden = true;
  const choose = () => {
    const fits = (row, choice) => row.cells[choice.dataset.column].textContent === choice.value;
    for (const row of table.tBodies[0].rows) row.hidden = !choices.every((choice) => fits(row, choice));
  };
  for (const choice of choices) choice.addEventListener("change", choose);
  choose();
  box.hidden = false;
}

// A row picks its marks out of the figures: while the pointer or the focus is on it, or until Escape where its link was followed.
let kept = "";
const pick = (key) => {
  for (const drawing of document.querySelectorAll("figure svg:has(.mark)")) {
    const marks = [...drawing.querySelectorAll(".mark")];
    for (const mark of marks) mark.classList.toggle("lit", mark.dataset.mark === key);
    drawing.classList.toggle("picked", marks.some((mark) => mark.dataset.mark === key));
  }
};
for (const row of document.querySelectorAll("tr[data-mark]")) {
  for (const event of ["pointerenter", "focusin"]) row.addEventListener(event, () => pick(row.dataset.mark));
  for (const event of ["pointerleave", "focusout"]) row.addEventListener(event, () => pick(kept));
  row.querySelector("a")?.addEventListener("click", () => pick(kept = row.dataset.mark));
}
addEventListener("keydown", (event) => { if (event.key === "Escape") pick(kept = ""); });

// The contents say where one is: at the last heading that has reached the top, where a link to it would put it.
const links = [...document.querySelectorAll(".bar a")];
const headings = links.map((link) => document.getElementById(link.hash.slice(1)));
const top_pixels = 72;
const seen = new IntersectionObserver(() => {
  const now = Math.max(headings.findLastIndex((heading) => heading.getBoundingClientRect().top < top_pixels), 0);
  for (const [number, link] of links.entries()) number === now ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
}, { rootMargin: `-${top_pixels}px 0px 0px` });
for (const heading of headings) seen.observe(heading);

// A link into a closed part opens it. What is behind "#" may be anything: a lone "%" cannot be decoded.
const wanted = () => {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
};
const open = () => {
  const target = document.getElementById(wanted());
  const below = target?.nextElementSibling;  // what a heading is of, where that is folded
  for (let part = below?.tagName === "DETAILS" ? below : target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  if (target) target.scrollIntoView();
};
addEventListener("hashchange", open);
open();
