"""check_labels() and set_label_checks(), as far as they can be tried without CUDA kernels: with a record made by hand.

What the kernels record is in tests/test_cuda.py and tests/test_cuda_host_promises.py.
"""

import pytest
import torch

import fusedloss
from fusedloss import _ops, labels

from .registry import Maker

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def put_back():
    yield
    fusedloss.set_label_checks("async")


@pytest.fixture
def record(monkeypatch):
    """The memory of a device that does not raise, which here is the CPU."""
    memory = torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(_ops, "runs_cuda_kernels", lambda device: True)
    monkeypatch.setattr(_ops, "devices_with_records", lambda: [CPU])
    monkeypatch.setattr(_ops, "bad_label_record", lambda device: memory)
    return memory


def remember(record, value, position, classes):
    record.copy_(torch.tensor([1, value, position, classes]))


@pytest.mark.parametrize("device", [None, "cpu", CPU], ids=str)
def test_on_the_cpu_there_is_nothing_to_check(device):
    with pytest.raises(IndexError):
        fusedloss.cross_entropy(torch.zeros(4, 3), torch.tensor([0, 1, 3, 0]))
    fusedloss.check_labels(device)


def test_on_the_cpu_both_modes_raise_the_same():
    messages = []
    for mode in ("sync", "async"):
        fusedloss.set_label_checks(mode)
        for function in (fusedloss.cross_entropy, fusedloss.dice_loss):
            with pytest.raises(IndexError) as caught:
                function(torch.zeros(4, 3), torch.tensor([0, 1, 3, 0]))
            messages.append(str(caught.value))
    assert messages[:2] == messages[2:]


@pytest.mark.parametrize("mode", ["", "Sync", None, True, 1])
def test_another_mode_is_refused(mode):
    with pytest.raises(ValueError, match=r"set_label_checks: `mode` must be 'async' or 'sync', got"):
        fusedloss.set_label_checks(mode)
    assert not labels.checked_in_each_call


def test_what_is_remembered_is_told_once(record):
    fusedloss.check_labels()
    remember(record, -7, 12, 3)
    with pytest.raises(IndexError, match=r"^check_labels: target at flat position 12 .*\[0, 3\).*got -7 .*cpu$"):
        fusedloss.check_labels()
    assert record.tolist() == [0, 0, 0, 0]
    fusedloss.check_labels()


def test_another_device_is_not_asked(record):
    remember(record, 3, 0, 3)
    fusedloss.check_labels(torch.device("cuda", 0))
    fusedloss.check_labels(0)
    assert record[0] == 1
    with pytest.raises(IndexError):
        fusedloss.check_labels("cpu")


@pytest.mark.parametrize(
    ("name", "target", "value", "wanted"),
    [
        ("cross_entropy", torch.tensor([0, 1, 9, 8]), 8, r"\(2,\) must be in \[0, 3\) or ignore_index \(-1\), got 9"),
        ("cross_entropy", torch.tensor([0, -1, -1, -2]), -2, r"\(3,\) must be in .*, got -2"),
        ("segmentation", torch.eye(4)[:, :3].long() * 2, 2, r"\(0, 0\) must be 0 or 1 in a mask, got 2"),
    ],
)
def test_in_each_call_the_first_is_named_as_on_the_cpu(record, name, target, value, wanted):
    """The device remembers any of them."""
    remember(record, value, 3, 3)
    with pytest.raises(IndexError, match=f"^{name}: target at {wanted}$"):
        labels.check_call(name, torch.zeros(4, 3), target, -1)
    assert record[0] == 0
    labels.check_call(name, torch.zeros(4, 3), target, -1)


def test_a_call_is_not_blamed_for_an_earlier_one(record):
    fusedloss.set_label_checks("sync")
    for name in ("cross_entropy", "soft_iou_loss"):
        for activation in ("softmax", "sigmoid"):
            x, y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
            options = {} if name == "cross_entropy" else {"activation": activation}
            if options.get("activation") == "sigmoid":
                y = torch.zeros(4, 3, dtype=torch.uint8)
            remember(record, 9, 100, 3)
            with pytest.raises(IndexError, match=r"^check_labels: .* 100 .* 9 in an earlier call"):
                getattr(fusedloss, name)(x, y, **options)
            getattr(fusedloss, name)(x, y, **options)


def test_right_calls_in_each_mode(record):
    for mode in ("sync", "async"):
        fusedloss.set_label_checks(mode)
        loss = fusedloss.segmentation_loss(torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        assert loss.isfinite()


# ---- the reference in place of the kernels ---------------------------------------------------------------------------

BAD = [
    pytest.param("cross_entropy", 4, torch.tensor([1, 0, 3, 5]), {}, id="cross_entropy"),
    pytest.param("cross_entropy", 4, torch.tensor([1, 2, 3, -1]), {"ignore_index": 0}, id="0 is ignored"),
    pytest.param("brier_loss", 4, torch.tensor([1, 0, 3, 2**40]), {}, id="softmax"),
    pytest.param("brier_loss", 4, torch.tensor([1, 0, 3, -1]), {"activation": "sigmoid"}, id="sigmoid"),
    pytest.param("brier_loss", 1, torch.tensor([1, 0, 255, 2]), {"activation": "sigmoid"}, id="one class"),
    pytest.param("brier_loss", 1, torch.tensor([[1], [0], [1], [2]]), {"activation": "sigmoid"}, id="one mask"),
]


@pytest.mark.parametrize(("name", "classes", "target", "options"), BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_bad_label_is_nan_under_transforms(record, name, classes, target, options, dtype):
    """On a GPU, indexing with it would end every use of the device. The other pixels are as they were."""
    options = {"ignore_index": 255, "reduction": "none"} | options
    loss = getattr(fusedloss, name)
    m = Maker(dtype)
    logits, tangent = m.normal(4, classes), m.normal(4, classes)
    right = target.clone()
    right[3] = 1
    value, slope = torch.func.jvp(lambda x: loss(x, target, **options), (logits,), (tangent,))
    expected, expected_slope = torch.func.jvp(lambda x: loss(x, right, **options), (logits,), (tangent,))
    assert value.isnan().tolist() == slope.isnan().tolist() == [False, False, False, True]
    torch.testing.assert_close(value[:3], expected[:3], rtol=0, atol=0)
    torch.testing.assert_close(slope[:3], expected_slope[:3], rtol=0, atol=0)
    gradient = torch.func.grad(lambda x: loss(x, target, **options).sum())(logits)
    assert gradient.dtype == dtype
    assert gradient[3].isnan().all()
    assert gradient[:3].isfinite().all()


def test_a_bad_number_in_a_mask_is_nan_under_transforms(record):
    """In its class; under sigmoid the others have nothing to do with it."""
    logits, mask = Maker(torch.float32).normal(4, 3), torch.zeros(4, 3, dtype=torch.uint8)
    mask[2, 1] = 2
    gradient = torch.func.grad(lambda x: fusedloss.brier_loss(x, mask, activation="sigmoid"))(logits)
    assert gradient[2, 1].isnan()
    assert gradient[:, [0, 2]].isfinite().all()


def test_right_labels_are_left_alone(record):
    """Bit for bit; ignored ones, soft ones and bools too."""
    m = Maker(torch.float32)
    logits = m.normal(4, 3)
    for target in (m.labels(3, 4, ignored=-100), m.labels(3, 4, dtype=torch.uint8), m.probabilities(4, 3)):
        ours = torch.func.vmap(fusedloss.cross_entropy)(logits[None], target[None])
        assert torch.equal(ours[0], fusedloss.reference.cross_entropy(logits, target))
    mask = logits > 0
    ours = torch.func.vmap(lambda x, y: fusedloss.dice_loss(x, y, activation="sigmoid"))(logits[None], mask[None])
    assert torch.equal(ours[0], fusedloss.reference.dice_loss(logits, mask, activation="sigmoid"))


def test_classes_of_more_than_are_counted(record):
    """The list of chosen classes is an argument of the kernel, of fixed length."""
    logits, target = torch.zeros(2, 1025), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^dice_loss: `classes` must be None on CUDA with more than 1024 .*1 of 1025"):
        fusedloss._checks.check_segmentation(
            "dice_loss",
            logits,
            target,
            None,
            {"activation": "softmax", "ignore_index": -100, "pixel_weight": None, "classes": [3]},
        )
