"""The value is the truth's, in the shape and dtype that PyTorch gives, whoever asks for it."""

import pytest
import torch

from .compare import check
from .registry import each_case, each_dtype, each_reduction


@each_dtype
@each_reduction
@each_case
def test_value(case, reduction, dtype, device):
    call = case.make(dtype, device, reduction)
    value, _ = check(case.loss, call, wrt=())
    assert value.device.type == torch.device(device).type
    assert not value.requires_grad


@each_reduction
@each_case
def test_arguments_are_left_alone(case, reduction, device):
    call = case.make(torch.float32, device, reduction)
    copies = {name: tensor.clone() for name, tensor in call.tensors.items()}
    versions = {name: tensor._version for name, tensor in call.tensors.items()}
    call.run(case.loss.function)
    for name, tensor in call.tensors.items():
        assert torch.equal(tensor, copies[name]), name
        assert tensor._version == versions[name], name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@each_reduction
@each_case
def test_the_same_bits_with_and_without_grad(case, reduction, mode, device):
    plain = case.make(torch.float32, device, reduction)
    expected = plain.run(case.loss.function)
    call = plain.requiring_grad(["input"])
    with mode():
        value = call.run(case.loss.function)
    assert value.requires_grad == (mode is torch.enable_grad)
    assert torch.equal(value, expected)


@each_case
def test_result_is_fresh_memory(case, device):
    """Writing into the result reaches neither the arguments nor the result of the next call."""
    call = case.make(torch.float32, device, "none")
    expected = call.run(case.loss.function).clone()
    call.run(case.loss.function).fill_(7.0)
    assert torch.equal(call.run(case.loss.function), expected)
