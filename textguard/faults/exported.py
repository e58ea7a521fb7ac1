"""Graphs of torch.export, written in the modules and functions that torch.fx would have found."""

import contextlib
import inspect
import io
import itertools
import logging
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from textguard.errors import UnsupportedModel
from textguard.faults.operations import OPERATIONS

IsLeaf = Callable[[nn.Module, str], bool]

# A part of a tensor -> the tensor with another part in its place.
_SCATTERS = {
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
}


def is_exported(model: nn.Module) -> bool:
    """Whether a model is the module of an exported program, `torch.export.export(...).module()`."""
    return isinstance(model, fx.GraphModule) and any(
        isinstance(step.target, torch._ops.OpOverload) for step in model.graph.nodes
    )


def is_quantised(model: nn.Module) -> bool:
    """Whether a model holds a graph that torchao's `convert_pt2e` made: fp32 between values and weights stored as integers."""
    graphs = (module.graph for module in model.modules() if isinstance(module, fx.GraphModule))
    return any(getattr(step.target, "namespace", "") == "quantized_decomposed" for graph in graphs for step in graph.nodes)


def evaluation(model: nn.Module) -> nn.Module:
    """The model, in evaluation mode. Exported programs may refuse to be told so: their steps are the same in all modes.

    Examples
    --------
    >>> from torch import nn
    >>> from textguard.faults.exported import evaluation
    >>> evaluation(nn.Dropout()).training
    False
    """
    try:
        return model.eval()
    except NotImplementedError:
        for module in model.modules():
            module.training = False
        return model


def export(model: nn.Module, images: Tensor, functions: tuple[Callable, ...], is_leaf: IsLeaf) -> fx.GraphModule:
    """Trace a model with torch.export, for batches of any size.

    The forward runs once in Python, so control flow on shapes, assertions and lengths are no obstacle. What they come to for
    this batch is taken to hold for all others.

    Parameters
    ----------
    model : nn.Module
        The model.
    images : Tensor
        A batch [B, ...] of at least two.
    functions : tuple of callable
        torch's functions that are wanted in place of the operators of the same name.
    is_leaf : callable
        From a module and its name to whether its calls are to be single steps.

    Returns
    -------
    fx.GraphModule
        From images to what the model returns for them. Its parameters and modules are the model's own.

    Raises
    ------
    Exception
        torch.export cannot trace the model. Which exceptions it raises is not documented.
    """
    shapes = ({0: torch.export.Dim.AUTO},)
    before = logging.root.manager.disable
    logging.disable()  # torch logs and prints what it cannot trace, with stack and graph; the caller says so in one line
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False).module(check_guards=False)
    finally:
        logging.disable(before)
    return in_functions(program, functions, model, is_leaf)


def in_functions(
    program: fx.GraphModule,
    functions: tuple[Callable, ...],
    model: nn.Module | None = None,
    is_leaf: IsLeaf = lambda module, name: False,
) -> fx.GraphModule:
    """An exported program in torch's functions, so that its sites are found and its activations known.

    Parameters
    ----------
    program : fx.GraphModule
        What `ExportedProgram.module` returns.
    functions : tuple of callable
        torch's functions that are wanted in place of the operators of the same name, beside those of OPERATIONS.
    model : nn.Module, optional
        The model that it was made from. Its modules' calls become single steps again.
    is_leaf : callable
        For which modules they do.

    Returns
    -------
    fx.GraphModule
        From the first input to the only output.

    Raises
    ------
    UnsupportedModel
        The program has several inputs, or a step that is a program of its own.
    """
    if sum(step.op == "placeholder" for step in program.graph.nodes) != 1:
        raise UnsupportedModel("an exported program must have one input, a batch of images")
    graph = fx.Graph()
    result = _copy(program, graph, {})
    while isinstance(result, (tuple, list)) and len(result) == 1:
        result = result[0]
    graph.output(result)
    steps = list(graph.nodes)
    wanted = {*OPERATIONS, *functions}
    for step in steps:
        if isinstance(step.target, torch._ops.OpOverload):
            _call_function(step, wanted)
    if model is not None:
        _call_modules(graph, model, is_leaf)
    graph = _named_anew(graph)
    return fx.GraphModule(_attributes(graph, program, model), graph)


def _named_anew(graph: fx.Graph) -> fx.Graph:
    """The same graph, whose steps have the names that torch.fx would have given them. Unread attributes are left out.

    Its inputs come first, as in graphs of torch.fx: who runs it from any later step on has them.
    """
    fresh, seen = fx.Graph(), {}
    for step in sorted(graph.nodes, key=lambda step: step.op != "placeholder"):
        if step.op == "get_attr" and not step.users:  # other steps that nothing reads may be sites
            continue
        args, kwargs = fx.map_arg((step.args, step.kwargs), seen.__getitem__)
        seen[step] = fresh.create_node(step.op, step.target, args, kwargs)
        seen[step].meta = dict(step.meta)
    return fresh


def _copy(program: fx.GraphModule, graph: fx.Graph, seen: dict[fx.Node, Any], place: str = "") -> Any:
    """Copy a program's steps into a graph, without those that only check. Returns its output, in the graph's steps.

    seen: a step -> what it is in the graph; at first the inputs, where they are known. place: the program's name and a dot.
    """
    for step in program.graph.nodes:
        name, arguments = _inner(step)
        if step.op == "output":
            return fx.map_arg(step.args[0], seen.__getitem__)
        if name:
            inner = program.get_submodule(name)
            inputs = [one for one in inner.graph.nodes if one.op == "placeholder"]
            given = dict(zip(inputs, fx.map_arg(arguments, seen.__getitem__), strict=True))
            seen[step] = _copy(inner, graph, given, f"{place}{name}.")
        elif step.target is operator.getitem and isinstance(seen[step.args[0]], (tuple, list)):
            seen[step] = seen[step.args[0]][step.args[1]]
        elif step not in seen and not _only_checks(step):
            seen[step] = graph.node_copy(step, seen.__getitem__)
            if step.op == "get_attr":
                seen[step].target = f"{place}{step.target}"
    raise AssertionError("a graph ends with its output")


def _inner(step: fx.Node) -> tuple[str, tuple]:
    """The name of the program that a step runs with autocast or gradients off, and its arguments; "" where it does not."""
    name = getattr(step.target, "__name__", "")
    at = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}.get(name)
    if at is None or (name == "wrap_with_autocast" and step.args[2]):
        return "", ()
    return step.args[at].target, step.args[at + 1 :]


def _only_checks(step: fx.Node) -> bool:
    """Whether a step only asserts what is known of the exported batch."""
    if step.op == "call_module":
        return step.target == "_guards_fn"
    packet = getattr(step.target, "overloadpacket", None)
    return packet is not None and packet.__name__.startswith(("_assert", "sym_constrain_range"))


def _call_function(step: fx.Node, wanted: set[Callable]) -> None:
    """Make an operator's step one of torch's function with its name; one that writes in place gives a new value instead."""
    name = step.target.overloadpacket.__name__
    if step.target._schema.is_mutable and name.endswith("_") and isinstance(step.args[0], fx.Node):
        name = name.removesuffix("_")
        packet, overload = getattr(torch.ops.aten, name, None), step.target._overloadname
        if overload not in (packet.overloads() if packet else ()):
            return  # it stays in place, and is refused as such
        step.target = getattr(packet, overload)
        _carry_on(step.args[0], step)
    # Where both have it, torch's own takes the operator's arguments in their order, which nn.functional's need not.
    step.target = next((found for place in (torch, F) if (found := getattr(place, name, None)) in wanted), step.target)


def _carry_on(changed: fx.Node, new: fx.Node) -> None:
    """Let the steps behind `new` read it in place of `changed`, and what `changed` is a part of with it.

    Other views of the same memory are not followed. Who traces has to compare the outputs.
    """
    later = itertools.dropwhile(lambda step: step is not new, list(new.graph.nodes))
    for reader in itertools.islice(later, 1, None):
        reader.replace_input_with(changed, new)
    if changed.target in _SCATTERS:
        with new.graph.inserting_after(new):
            scattered = new.graph.call_function(_SCATTERS[changed.target], (changed.args[0], new, *changed.args[1:]))
        scattered.meta = dict(changed.args[0].meta)
        _carry_on(changed.args[0], scattered)


def _call_modules(graph: fx.Graph, model: nn.Module, is_leaf: IsLeaf) -> None:
    """Make the steps of each call of a leaf module one step."""
    modules = dict(model.named_modules())
    calls: dict[str, tuple[str, dict, list[fx.Node]]] = {}
    for step in graph.nodes:
        if step.op != "call_function" or not isinstance(step.meta.get("val"), Tensor):
            continue
        stack = {}
        for key, entry in (step.meta.get("nn_module_stack") or {}).items():
            stack[key] = entry
            name = str(entry[0])
            if name in modules and is_leaf(modules[name], name):
                calls.setdefault(key, (name, stack, []))[2].append(step)
                break
    for name, stack, steps in calls.values():
        module, inside = modules[name], set(steps)
        given = {read for step in steps for read in step.all_input_nodes if read not in inside and _is_value(read)}
        made = [step for step in steps if any(reader not in inside for reader in step.users)]
        if len(given) != 1 or len(made) != 1 or not _has_one_argument(module):
            continue
        with graph.inserting_after(made[0]):
            call = graph.call_module(name, (given.pop(),))
        call.meta = {**made[0].meta, "nn_module_stack": stack}
        made[0].replace_all_uses_with(call)
        for step in reversed(steps):
            graph.erase_node(step)


def _is_value(step: fx.Node) -> bool:
    """Whether a step is a tensor that images flow into, or may."""
    return step.op != "get_attr" and isinstance(step.meta.get("val"), Tensor)


def _has_one_argument(module: nn.Module) -> bool:
    """Whether a module makes a tensor of one tensor."""
    needed = [one for one in inspect.signature(module.forward).parameters.values() if one.default is one.empty]
    return len(needed) == 1 and needed[0].kind is not needed[0].VAR_KEYWORD and not isinstance(module, nn.RNNBase)


def _attributes(graph: fx.Graph, program: fx.GraphModule, model: nn.Module | None) -> dict[str, Any]:
    """What the steps of a graph read, by name. Parameters get the first of their names, as in `named_parameters`."""
    names = {id(value): name for name, value in (model or program).named_parameters()}
    found: dict[str, Any] = {}
    for step in graph.nodes:
        if step.op == "call_module":
            found[step.target] = (model or program).get_submodule(step.target)
        elif step.op == "get_attr":
            value: Any = program
            for part in step.target.split("."):
                value = getattr(value, part)
            if isinstance(value, fx.GraphModule):
                raise UnsupportedModel(f"step {step.name} of the exported program is a program of its own")
            step.target = names.get(id(value), step.target)
            found[step.target] = value
    return found
