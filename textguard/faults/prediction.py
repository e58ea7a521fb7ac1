"""What faults will do to the loss, foreseen from one forward and one backward pass.

A fault is carried on exactly while it stays one value, or the few that pooling and depthwise convolutions make of it. Behind
that, its effect on the margin m is taken to be linear, where m is the own logit minus the logsumexp of the others. The cross
entropy is softplus(-m), so that a change of m gives DeltaLoss. Predictions only decide which faults are looked at: bad ones
make estimates less precise, never wrong.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from textguard.errors import Setting, UnsupportedModel
from textguard.faults.damage import Operation, Storage
from textguard.faults.graph import TracedModel, Values
from textguard.faults.local import ADDITIONS, ELEMENTWISE, PRODUCTS, LocalSteps, as_map, neuron_patch, read
from textguard.faults.sites import INTEGERS, Site
from textguard.faults.task import class_margin

Chain = tuple[fx.Node, ...]
Margin = Callable[[Tensor, Tensor], Tensor]  # from logits and labels to the number [B] whose negative's softplus is the loss

# Plain steps behind which a change in one channel is still in one channel only, whatever their settings.
ONE_CHANNEL = (*ELEMENTWISE, nn.MaxPool2d)
LARGEST = 500.0  # exp of it is a float64
LEAST_MARGIN = 0.05  # below which all images count as equally close to another class
REACHED = 0.3  # of the lost margin, what counts without its sign


@dataclass(frozen=True)
class Prediction:
    """The golden run of B images, and how each site's values move the margin.

    Attributes
    ----------
    sites : sequence of Site
        The engine's, by position.
    storages : sequence of Storage
        How what faults hit is stored, by position.
    outputs : dict of int to Tensor
        Position -> the site's golden output.
    slopes : dict of int to Tensor
        Position -> the margin's gradient at the end of the site's chain; at its output where it has none.
    doubt : Tensor
        float64 [B], 1 - p(label).
    chains : dict of int to tuple of fx.Node
        Position -> the steps that a fault is carried through, the site's own first; none where nothing is known of them.
    golden : dict of fx.Node to Any
        The values of these steps, and of those that they read.
    local : LocalSteps or None
        Carries faults through the chains.
    """

    sites: Sequence[Site]
    storages: Sequence[Storage]
    outputs: Mapping[int, Tensor]
    slopes: Mapping[int, Tensor]
    doubt: Tensor
    chains: Mapping[int, Chain] = field(default_factory=dict)
    golden: Values = field(default_factory=dict)
    local: LocalSteps | None = None

    @torch.no_grad()
    def changes(
        self, position: int, image: Tensor, neuron: Tensor, masks: Tensor, operation: Operation, limit: float
    ) -> tuple[Tensor, Tensor]:
        """How far damaged neurons of a site move the margin.

        Parameters
        ----------
        position : int
            The site's.
        image, neuron : Tensor
            int64 [N]: image in the batch, and index into its flattened output.
        masks : Tensor
            int64 [1 or N, V]. V ways to damage each neuron, every one with bits of its own.
        operation : {"flip", "stuck_at_0", "stuck_at_1"}
            What happens to the bits.
        limit : float
            The largest magnitude that the range detector lets pass.

        Returns
        -------
        change, reach : Tensor
            float64 [N, V]. The margin's change; and how large it would be if all that a fault changes worked in one direction.
        """
        output = self.outputs[position]
        output = self.storages[position].by_image(output, len(self.doubt))

        def golden(row: Tensor, which: Tensor) -> Tensor:
            return output[(image[row], *torch.unravel_index(which, output.shape[1:]))]

        before, written = self.storages[position].variants(neuron, masks, operation, limit, golden)
        chain = self.chains.get(position)
        if not chain:
            at = (image, *torch.unravel_index(neuron, output.shape[1:]))
            slopes = self.storages[position].by_image(self.slopes[position], len(self.doubt))
            moved = (written - before).double()
            axis = 1 if output.ndim == 4 else -1
            usual = _usual(slopes, axis)[image, at[axis]][:, None]
            slope = slopes[at][:, None]
            return moved * slope, moved.abs() * torch.maximum(slope.abs(), usual)
        patch = neuron_patch(_map_shape(output), neuron, written)
        for source, step in itertools.pairwise(chain):
            patch = self.local.run(step, {source: patch}, self.golden, image)
        moved = (patch.values - read(as_map(self.golden[chain[-1]]), image, patch)).double()
        slopes = as_map(self.slopes[position])
        slope, usual = read(slopes, image, patch), _usual(slopes, 1)[image, patch.channel][:, None, None, None]
        reach = moved.abs() * torch.maximum(slope.abs(), usual)
        return (moved * slope).flatten(1, 2).sum(dim=1), reach.flatten(1, 2).sum(dim=1)


def loss_changes(doubt: Tensor, change: Tensor) -> Tensor:
    """DeltaLoss, in nats, where the margin changes by `change`: softplus(-m - change) - softplus(-m), without its sign.

    doubt: 1 - p(label) = sigmoid(-m), float64, broadcastable to change. Returns float64, NaN where change is.
    """
    worse = -change
    return (torch.log1p(doubt * torch.expm1(worse.clamp(max=LARGEST))) + (worse - LARGEST).clamp(min=0)).abs()


def class_changes(doubt: Tensor, change: Tensor, reach: Tensor) -> Tensor:
    """How likely a change of the margin is to change the class: from 0 to 1, 0.5 where just all of the margin is lost.

    doubt: as for `loss_changes`. change, reach: as `Prediction.changes` returns them. What a large change of the margin does is
    not linear, so that what it reaches counts too. Returns float64, 1 where change is NaN.
    """
    margin = (torch.log1p(-doubt) - doubt.clamp(min=1e-300).log()).clamp(min=LEAST_MARGIN)
    lost = ((1 - REACHED) * (-change).clamp(min=0) + REACHED * reach) / margin
    return (1 - 1 / (1 + lost.square())).nan_to_num(nan=1.0)


def chains_of(traced: TracedModel) -> dict[int, Chain]:
    """Position -> the steps that one damaged value of the site can be followed through, the site's own first.

    A chain ends where several steps read the value, because the gradient there knows of all of them. It is empty where the site
    is a call inside a step, or where its step has several rows per image.
    """
    chains = {}
    for index, positions in traced.at.items():
        for position in positions:
            steps = [traced.steps[index]]
            if not traced.is_whole(position) or traced.shapes[steps[0]] != traced.sites[position].shape:
                chains[position] = ()
                continue
            while len(steps[-1].users) == 1 and _keeps_to_its_channel(traced, steps[-1], next(iter(steps[-1].users))):
                steps.append(next(iter(steps[-1].users)))
            chains[position] = tuple(steps)
    return chains


def _keeps_to_its_channel(traced: TracedModel, step: fx.Node, reader: fx.Node) -> bool:
    """Whether what `reader` makes of one channel of `step` is one channel again, and LocalSteps can compute it."""
    operation = traced.operation(reader)
    if reader.op == "output" or traced.shapes.get(reader) is None:
        return False
    if not all(map(traced.batch_first, (reader, *reader.all_input_nodes))):
        return False
    if operation in ADDITIONS:
        return (
            len(reader.args) == 2
            and not reader.kwargs
            and all(
                isinstance(arg, fx.Node) and traced.depends_on_images(arg) and traced.shapes.get(arg) == traced.shapes[step]
                for arg in reader.args
            )
            and reader.args[0] is not reader.args[1]
        )
    if operation in PRODUCTS:
        others = [arg for arg in reader.args if arg is not step]
        constants = [traced.constants.get(arg) if isinstance(arg, fx.Node) else arg for arg in others]
        return (
            len(constants) == 1
            and not reader.kwargs
            and constants[0] is not None
            and (not isinstance(constants[0], Tensor) or constants[0].numel() == 1)
        )
    if not traced.is_plain(reader):
        return False
    module = traced.modules.get(reader.target) if reader.op == "call_module" else None
    if operation is nn.Conv2d:
        return (
            module.groups == module.in_channels == module.out_channels
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
    if operation is nn.BatchNorm2d:
        return module.running_mean is not None
    return operation in ONE_CHANNEL and not getattr(module, "return_indices", False)


def foresee(
    run: Callable[[Tensor, Callable[[int, Tensor], None], Callable[[fx.Node, Tensor], None]], Tensor],
    sites: Sequence[Site],
    storages: Sequence[Storage],
    images: Tensor,
    labels: Tensor,
    chains: Mapping[int, Chain],
    local: LocalSteps | None,
    margin_of: Margin = class_margin,
) -> Prediction:
    """Run images [B, ...] with labels [B] forth and back. run(images, see, keep): gives the logits, shows sites and steps.

    Raises UnsupportedModel where model or margin have no gradients.
    """
    if integer := next((site.layer for site in sites if site.dtype in INTEGERS.values()), None):
        raise UnsupportedModel(
            f"layer {integer!r} stores integers, through which no gradient leads: their faults cannot be foreseen; take ",
            "uniform for ",
            Setting("plan"),
        )
    outputs: dict[int, Tensor] = {}
    values: Values = {}
    wanted = {one for chain in chains.values() for step in chain[1:] for one in (step, *step.all_input_nodes)}
    wanted |= {step for chain in chains.values() for step in chain}

    def keep(step: fx.Node, value: Tensor) -> None:
        if step in wanted:
            values[step] = value

    with torch.inference_mode(False), torch.enable_grad():
        images = images.clone()
        # Whole numbers, such as those of words, have no gradients; the model's weights have.
        logits = run(images.requires_grad_() if images.is_floating_point() else images, outputs.__setitem__, keep)
        margin = margin_of(logits, labels.clone())
        ends = [values[chains[position][-1]] if chains.get(position) else output for position, output in outputs.items()]
        try:
            slopes = torch.autograd.grad(margin.sum(), ends, allow_unused=True)
        except RuntimeError as reason:
            raise UnsupportedModel(f"the model or its loss has no gradients ({str(reason).partition(chr(10))[0]})") from reason
    return Prediction(
        sites,
        storages,
        {position: output.detach() for position, output in outputs.items()},
        {
            position: torch.zeros_like(end) if slope is None else slope.nan_to_num(0.0, 0.0, 0.0)
            for position, end, slope in zip(outputs, ends, slopes, strict=True)
        },
        torch.sigmoid(-margin.detach().double()),
        chains,
        {step: value.detach() if isinstance(value, Tensor) else value for step, value in values.items()},
        local,
    )


def straight_through(output: Tensor, rounded: Tensor) -> Tensor:
    """The rounded output, with the gradient of the one that is not: rounding has none."""
    return output + (rounded - output).detach() if torch.is_grad_enabled() else rounded


def _usual(slopes: Tensor, axis: int) -> Tensor:
    """The root mean square of each image's slopes by channel, [B, C]: where one place's slope is 0, a fault's may not be.

    slopes: [B, ...]. axis: of the channels.
    """
    return slopes.movedim(axis, 1).flatten(2).square().mean(dim=2).sqrt() if slopes.ndim > 2 else slopes.abs()


def _map_shape(output: Tensor) -> tuple[int, ...]:
    """The shape of one image's value [B, ...] as `as_map` sees it, without height and width where it has none."""
    return tuple(output.shape[1:]) if output.ndim == 4 else (output[0].numel(),)
