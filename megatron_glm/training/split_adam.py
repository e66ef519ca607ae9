"""Adam on weights in two halves: what --use-precision-aware-optimizer takes without Transformer
Engine.

An fp32 main weight beside its bf16 copy stores the upper bits twice. Here the copy is the upper
half, the weight rounded to the nearest bf16 (ties away from zero), and the optimizer keeps the rest
as an int16 that may be negative: 10 bytes a weight instead of 12, nothing lost, and no pass over
main weights to copy them into the model's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import adam

from megatron_glm.errors import FlagError, flag_of
from megatron_glm.training.optimizer_state import with_steps_by_weight

HALF = 1 << 15
QUIET_NAN = 0x7FC00000
MAIN_WEIGHT = "master_param"
"""Transformer Engine's name of the state, by which Megatron asks for it."""
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENT_DTYPES = (torch.float32, torch.bfloat16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 weight of a bf16 weight and an int16 remainder of the same shape."""
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def split(main: Tensor) -> tuple[Tensor, Tensor]:
    """bf16 weight and int16 remainder of an fp32 weight; what is NaN becomes the quiet one."""
    bits = main.view(torch.int32).masked_fill(main.isnan(), QUIET_NAN)
    upper = (bits + HALF) >> 16
    return upper.short().view(torch.bfloat16), (bits - (upper << 16)).short()


class SplitAdam(torch.optim.Optimizer):
    """Adam as Megatron makes and uses that of Transformer Engine.

    params: bf16, or groups of such; a gradient is `decoupled_grad` of a weight, fp32 or bf16.
    adam_w_mode: decoupled weight decay, as in AdamW. exp_avg_dtype, exp_avg_sq_dtype: how the
    moments are stored, fp32 or bf16; the arithmetic is in fp32. master_weights, capturable:
    accepted, since Megatron gives them.

    Raises:
        FlagError: weights are not in bf16, or a state is to be stored in a type that needs scaling.
    """

    def __init__(
        self,
        params: Iterable,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        master_weights: bool = True,
        capturable: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
    ):
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
             "adam_w_mode": adam_w_mode},
        )  # fmt: skip
        self._moments = dict(zip(MOMENTS, (exp_avg_dtype, exp_avg_sq_dtype), strict=True))
        _check_dtypes(master_weight_dtype, self._moments)
        for weight in self._weights():
            if weight.dtype != torch.bfloat16:
                raise FlagError(
                    f"--use-precision-aware-optimizer: a weight is in {weight.dtype}, and without "
                    "Transformer Engine weights must be in bf16; add --bf16 or drop the flag"
                )

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:
        """Update every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = getattr(weight, "decoupled_grad", None)
                if gradient is None:
                    continue
                if weight.is_cuda:
                    from megatron_glm.training.split_adam_kernel import step_by_kernel

                    step_by_kernel(weight, gradient, self._state_of(weight), group)
                else:
                    step_by_torch(weight, gradient, self._state_of(weight), group)

    def state_dict(self) -> dict:
        """As torch's, of a state that is there before the first step too."""
        for weight in self._weights():
            self._state_of(weight)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Take the state as it is: torch's own method would round all of it to bf16."""
        state_dict = with_steps_by_weight(state_dict, self.defaults)
        own = self.state
        super().load_state_dict(state_dict | {"state": {}})
        self.state = own
        for index, weight in enumerate(self._weights()):
            for name, value in state_dict["state"].get(index, {}).items():
                self._state_of(weight)[name].copy_(value)

    def get_unscaled_state(self, weight: Tensor, name: str) -> Tensor:
        """A state in fp32, as checkpoints hold it whatever the flags are. Main weights are made on
        the host: on the device all of them together would take what the halves save."""
        if name != MAIN_WEIGHT:
            return self._state_of(weight)[name].float()
        return join(weight.detach().cpu(), self._state_of(weight)[name].cpu())

    @torch.no_grad()
    def set_scaled_state(self, weight: Tensor, name: str, value: Tensor) -> None:
        """Take a state in fp32; a main weight sets the weight too."""
        if name == MAIN_WEIGHT:
            upper, value = split(value.float())
            weight.copy_(upper)
        self._state_of(weight)[name].copy_(value)

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        """Made when it is first asked for: the distributed optimizer puts its shares in the places
        of the weights that the optimizer was made with."""
        state = self.state[weight]
        if not state:
            # On the host, where Megatron looks for it where there is no Transformer Engine.
            state["step"] = torch.zeros(())
            for name, dtype in (self._moments | {MAIN_WEIGHT: torch.int16}).items():
                state[name] = torch.zeros_like(weight, dtype=dtype)
        return state

    def _weights(self) -> Iterable[Tensor]:
        return (weight for group in self.param_groups for weight in group["params"])


def step_by_torch(weight: Tensor, gradient: Tensor, state: dict, group: dict[str, Any]) -> None:
    """One step on one weight by torch's Adam, fp32 copies of all halves being made for it."""
    main, (first, second) = join(weight, state[MAIN_WEIGHT]), (state[n].float() for n in MOMENTS)
    adam.adam(
        [main], [gradient.float()], [first], [second], [], [state["step"]],
        fused=True, decoupled_weight_decay=group["adam_w_mode"], amsgrad=False,
        beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
        weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip
    for target, value in zip(
        (weight, state[MAIN_WEIGHT], *(state[name] for name in MOMENTS)),
        (*split(main), first, second),
        strict=True,
    ):
        target.copy_(value)


def check_split_adam(chunks: list[torch.nn.Module], **_: int) -> list[torch.nn.Module]:
    """Compares, on a GPU, steps there with steps on the host. A hook after wrapping, as Megatron
    calls them; raises KernelConformanceError."""
    from megatron_glm.model.fused.conformance import KernelConformanceError

    device = next(chunks[0].parameters()).device
    if device.type != "cuda":
        return chunks
    main, *gradients = torch.randn(3, 10_000, generator=torch.Generator().manual_seed(0))

    def after_steps(device: torch.device) -> Tensor:
        weight = torch.empty_like(main, dtype=torch.bfloat16, device=device)
        adam = SplitAdam([weight], lr=1e-2, weight_decay=0.1)
        adam.set_scaled_state(weight, MAIN_WEIGHT, main.to(device))
        for gradient in gradients:
            weight.decoupled_grad = gradient.to(device)
            adam.step()
        return adam.get_unscaled_state(weight, MAIN_WEIGHT)

    error = (after_steps(device) - after_steps(torch.device("cpu"))).abs().max().item()
    # Two roundings a step, on either.
    tolerance = 2 * 4 * torch.finfo(main.dtype).eps * main.abs().max().item()
    if not error <= tolerance:
        raise KernelConformanceError(
            f"kernel split_adam_step on {device} is wrong by {error:.2g}, {tolerance:.2g} is due. "
            "Train without --use-precision-aware-optimizer, and report this"
        )
    return chunks


def _check_dtypes(main_weight: torch.dtype, moments: dict[str, torch.dtype]) -> None:
    if main_weight != torch.float32:
        raise FlagError(
            f"--main-params-dtype {main_weight}: without Transformer Engine main weights must be "
            "in fp32, of which the upper half is the weight itself; drop the flag"
        )
    for name, dtype in moments.items():
        if dtype not in MOMENT_DTYPES:
            raise FlagError(
                f"{flag_of(name)}-dtype {dtype}: must be fp32 or bf16 without "
                "Transformer Engine, which scales what needs it"
            )
