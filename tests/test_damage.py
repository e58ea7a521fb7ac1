"""What a fault does to stored values: weights, blocks of values, the metadata that they share, codes."""

import math

import numpy as np
import pytest
import torch

from fault_helpers import make_faults
from textguard.errors import InvalidParameter, UnknownName
from textguard.faults.damage import Call, FaultModel, Faults, Storage, damage_output, damage_weights, operate
from textguard.faults.formats import parse_format


def test_weights_are_restored_when_an_inference_fails():
    weight, inputs = torch.randn(4, 3), torch.randn(2, 3)
    before, calls = weight.clone(), []

    def fail_at_the_second(x, w):
        calls.append(w.clone())
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return x @ w.t()

    faults = make_faults([0, 0], [0, 1], [1, 7], 1 << 30, model=FaultModel(target="weight"))
    call = Call(fail_at_the_second, "Linear", (inputs, weight), {}, inputs @ weight.t())
    storage = Storage(parse_format("fp32"), 1.0, 12, weight.device)
    with pytest.raises(RuntimeError, match="out of memory"):
        damage_weights(storage, call, faults)
    assert torch.equal(weight, before)
    assert [(found != before).flatten().nonzero().tolist() for found in calls] == [[[1]], [[7]]]


def test_a_block_of_values_follows_its_exponent_and_no_other_does():
    # 37 values per image in blocks of 16: the last has 5.
    form = parse_format("bfp(8,7,16)")
    storage = Storage(form, 0.0, 37, torch.device("cpu"))
    output = storage.round(torch.randn(3, 37, generator=torch.Generator().manual_seed(0)))
    golden = output.clone()
    faults = Faults(
        model=FaultModel(target="metadata"),
        position=torch.zeros(3, dtype=torch.int64),
        image=torch.arange(3),
        limit=torch.tensor([math.inf, math.inf, 20.0]),
        row=torch.tensor([0, 0, 1, 2]),
        neuron=torch.tensor([0, 2, 2, 1]),
        mask=torch.tensor([1, 4, 2, 8]),
    )
    damage = damage_output(storage, output, faults)
    blocks = [(0, 0, 16), (0, 32, 37), (1, 32, 37), (2, 16, 32)]
    codes = [math.frexp(float(golden[row, start:end].abs().max()))[1] - 1 + 127 for row, start, end in blocks]
    assert damage.golden.tolist() == codes
    assert damage.faulty.tolist() == [code ^ mask for code, mask in zip(codes, (1, 4, 2, 8), strict=True)]
    expected = golden.clone()
    for (row, start, end), code, mask in zip(blocks, codes, (1, 4, 2, 8), strict=True):
        expected[row, start:end] *= 2.0 ** ((code ^ mask) - code)
    beyond = expected[2, 16:32].abs() > 20
    expected[2, 16:32] = expected[2, 16:32].clamp(-20, 20)
    assert torch.equal(output, expected)
    assert damage.detected.tolist() == [False, False, False, bool(beyond.any())]


def test_adaptivfloats_bias_moves_the_whole_layer():
    form = parse_format("adaptivfloat(4,3)")
    storage = Storage(form, 5.3, 11, torch.device("cpu"))
    output = storage.round(torch.randn(2, 11, generator=torch.Generator().manual_seed(1)))
    golden = output.clone()
    faults = make_faults([0, 0], [0, 1], [0, 0], [0b10, 0b1000_0000], model=FaultModel(target="metadata"))
    damage = damage_output(storage, output, faults)
    bias = 2 - 15  # 5.3 lies in [4, 8), and the largest exponent is 15
    assert damage.golden.tolist() == [bias & 0xFF] * 2 == [0b1111_0011] * 2
    assert damage.faulty.tolist() == [0b1111_0001, 0b0111_0011]
    assert torch.equal(output[0], golden[0] * 2.0**-2)
    # 2**(0b0111_0011) is 128 binades further: beyond fp32 for values from 1 on.
    expected = (golden[1].double() * 2.0**128).float()
    assert torch.equal(output[1], expected)
    assert expected.isinf().any()
    assert not expected.isinf().all()


def test_operations_on_codes():
    codes, mask = torch.tensor([0b1100, 0b0011]), torch.tensor([0b0101, 0b0101])
    assert operate(codes, mask, "flip").tolist() == [0b1001, 0b0110]
    assert operate(codes, mask, "stuck_at_0").tolist() == [0b1000, 0b0010]
    assert operate(codes, mask, "stuck_at_1").tolist() == [0b1101, 0b0111]


NO_FAULT_MODEL = [
    ({"target": "bias"}, UnknownName, "target 'bias' in argument fault_model.target; known: metadata, neuron, weight"),
    ({"target": None}, UnknownName, "target None in argument fault_model.target"),
    ({"operation": "set_zero"}, UnknownName, "known: flip, stuck_at_0, stuck_at_1"),
    ({"operation": ["flip"]}, UnknownName, r"operation \['flip'\] in"),
    ({"bits": 0}, InvalidParameter, "argument fault_model.bits is 0; at least 1 is needed"),
    ({"bits": 1.0}, InvalidParameter, "argument fault_model.bits is 1.0; it must be a whole number"),
    ({"values": True}, InvalidParameter, "argument fault_model.values is True; it must be a whole number"),
    ({"values": -3}, InvalidParameter, "argument fault_model.values is -3; at least 1"),
    ({"values": np.int64(0)}, InvalidParameter, "argument fault_model.values is 0; at least 1"),
]


@pytest.mark.parametrize(("fields", "error", "said"), NO_FAULT_MODEL, ids=str)
def test_a_fault_that_cannot_be_is_refused_when_it_is_described(fields, error, said):
    with pytest.raises(error, match=said):
        FaultModel(**fields)


def test_numpy_counts_are_counts():
    found = FaultModel(bits=np.int64(2), values=np.uint8(3))
    assert found == FaultModel(bits=2, values=3)
    assert [type(number) for number in (found.bits, found.values)] == [int, int]
