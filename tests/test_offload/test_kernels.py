"""The C kernel equals torch's AdamW and the reference in torch's operations, and says what to do where it cannot be."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from offload import building
from offload.errors import KernelError
from offload.kernels import HostKernel, Kernel, States, Step, TorchKernel, make_kernel


def _random(count: int, dtype: torch.dtype, seed: int = 0) -> tuple[States, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    master, first, gradient = (torch.randn(count, generator=generator) for _ in range(3))
    return States(master, first, torch.rand(count, generator=generator)), gradient.to(dtype)


def _clone(states: States) -> States:
    return States(*(tensor.clone() for tensor in states.tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_c_kernel_equals_the_reference_to_the_bit(dtype: torch.dtype) -> None:
    reference = TorchKernel()
    with_threads: list[Kernel] = [HostKernel(1), HostKernel(3)]
    for count in (1, 15, 1023, 70_001):
        for number, beta1, scale in ((1, 0.9, 1.0), (7, 0.3, 0.37), (1000, 0.95, 1 / 1024)):
            step = Step(number, 1e-2, (beta1, 0.95), 1e-8, 0.1, scale)
            states, gradient = _random(count, dtype)
            gradient[0], states.exp_avg_sq[0] = 0, 0
            wanted, wanted_out = _clone(states), torch.empty_like(gradient)
            reference.adamw(wanted, gradient, wanted_out, step)
            for kernel in with_threads:
                for in_place in (True, False):
                    mine, out = _clone(states), torch.empty_like(gradient)
                    into = mine if in_place else States.empty(count)
                    kernel.adamw(mine, gradient, out, step, None if in_place else into)
                    assert all(torch.equal(a, b) for a, b in zip(into.tensors, wanted.tensors, strict=True))
                    assert torch.equal(out, wanted_out)
                    if not in_place:
                        assert all(torch.equal(a, b) for a, b in zip(mine.tensors, states.tensors, strict=True))
    for kernel in with_threads:
        kernel.close()


def test_the_c_kernel_equals_torchs_fused_adamw_to_the_bit() -> None:
    count = 4096
    parameter = torch.randn(count, requires_grad=True)
    states = States(parameter.detach().clone(), torch.zeros(count), torch.zeros(count))
    theirs = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.2, fused=True)
    kernel = HostKernel(2)
    for number in range(1, 30):
        parameter.grad = torch.randn(count)
        kernel.adamw(states, parameter.grad, None, Step(number, 3e-3, (0.9, 0.99), 1e-8, 0.2))
        theirs.step()
    assert torch.equal(states.master, parameter)
    assert torch.equal(states.exp_avg, theirs.state[parameter]["exp_avg"])
    assert torch.equal(states.exp_avg_sq, theirs.state[parameter]["exp_avg_sq"])
    kernel.close()


def test_bf16_results_round_as_torch_does_also_ties_infinities_and_nans() -> None:
    bits = torch.tensor(
        [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0x00000001, 0x80008000]
    )
    masters = bits.to(torch.int64).to(torch.int32).view(torch.float32)
    count = len(masters)
    states = States(masters.clone(), torch.zeros(count), torch.zeros(count))
    out = torch.empty(count, dtype=torch.bfloat16)
    kernel = HostKernel(1)
    kernel.adamw(states, torch.zeros(count, dtype=torch.bfloat16), out, Step(1, 1e-3, (0.9, 0.95), 1e-8, 0.0))
    wanted = states.master.bfloat16()
    numbers = ~wanted.isnan()  # torch has two bit patterns for what is not a number
    assert torch.equal(out.isnan(), ~numbers)
    assert torch.equal(out[numbers].view(torch.int16), wanted[numbers].view(torch.int16))
    kernel.close()


def test_the_sum_of_squares_is_the_gradients_whatever_the_threads() -> None:
    sums = []
    for num_threads in (1, 4):
        states, gradient = _random(200_003, torch.bfloat16)
        kernel = HostKernel(num_threads)
        sums.append(kernel.squared_adamw(states, gradient, None, Step(1, 1e-3, (0.9, 0.95), 1e-8, 0.1, 0.5)))
        kernel.close()
    assert sums[0] == sums[1]
    assert sums[0] == pytest.approx(float(gradient.double().square().sum()), rel=1e-6)


def test_without_a_compiler_the_remedy_is_named(tmp_path: Path) -> None:
    recipe = building.Recipe("adamw.c", ("no-such-compiler",), (), "install a C compiler, or choose kernel='torch'")
    with pytest.raises(KernelError, match=r"none of no-such-compiler is on the path; .*kernel='torch'"):
        building.library(recipe, tmp_path)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    recipe = building.Recipe("adamw.c", ("cc",), ("-not-a-flag",), "choose kernel='torch'")
    with pytest.raises(KernelError, match=r"failed; choose kernel='torch'(.|\n)*not-a-flag"):
        building.library(recipe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_processes_and_threads_build_once_and_share(tmp_path: Path) -> None:
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(building.library(building.HOST, tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    (library,) = tmp_path.iterdir()
    made = library.stat().st_mtime_ns
    building.library(building.HOST, tmp_path)
    assert library.stat().st_mtime_ns == made


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    kernel = make_kernel("native", torch.device("cpu"))
    states, gradient = _random(10, torch.float32)
    step = Step(1, 1e-3, (0.9, 0.95), 1e-8, 0.1)
    with pytest.raises(KernelError, match="an update of 10 parameters on cpu got a tensor of 9"):
        kernel.adamw(states, gradient[:9], None, step)
    with pytest.raises(KernelError, match="float64; allowed"):
        kernel.adamw(states, gradient.double(), None, step)
    kernel.close()
    with pytest.raises(KernelError, match="closed"):
        kernel.adamw(states, gradient, None, step)
    with pytest.raises(KernelError, match="num_threads: 0"):
        HostKernel(0)
