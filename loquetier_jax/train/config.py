"""The training configuration, a frozen dataclass with TRL's names, and learning rate schedules. Imports no jax."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from loquetier_jax.borrowed import borrowing
from loquetier_jax.config import PACK_ALIGN, is_int, is_number, require
from loquetier_jax.errors import ConfigError
from loquetier_jax.step.loss_function import takes_batch
from loquetier_jax.train.trl_arguments import TRL_ARGUMENTS

OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor")
TRUNCATIONS = ("right", "left", "drop", "error")
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
LOSS_PER = ("target", "sample", "group")
_CHOICES = {"optim": OPTIMIZERS, "lr_scheduler_type": SCHEDULES, "truncation": TRUNCATIONS, "loss_per": LOSS_PER}
DEFAULT_PACK_TOKENS = 512
CALLABLE_LOSS = "callable"  # replaces a loss function in a saved config; it must be passed again on restore

_MOST = float(np.finfo(np.float32).max)  # larger numbers are infinite on the device
_INTEGERS = {  # field: smallest value; all are below 2**32
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "logging_steps": 1,
    "save_steps": 0,
    "save_total_limit": 1,
    "eval_steps": 0,
    "early_stopping_patience": 0,
}
_NUMBERS = {  # field: exclusive upper bound; all are >= 0
    "learning_rate": _MOST,
    "warmup_steps": _MOST,
    "num_train_epochs": 2.0**32,
    "max_grad_norm": _MOST,
    "weight_decay": _MOST,
    "adam_beta1": 1.0,
    "adam_beta2": 1.0,
    "adam_epsilon": _MOST,
    "momentum": 1.0,
    "early_stopping_threshold": _MOST,
}


@borrowing(TRL_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one job, with the names and semantics of TRL's SFTConfig and transformers' TrainingArguments.

    Their other arguments are accepted where they match what is done here (`warmup_ratio`, `optim="adamw_torch"`,
    `report_to="none"`, `gradient_checkpointing`) and refused with an explanation otherwise; see `train.trl_arguments`.

    Attributes:
        learning_rate: Peak learning rate.
        lr_scheduler_type: "constant", "constant_with_warmup", "linear" or "cosine", as in transformers.
        warmup_steps: Optimizer steps of linear warm-up; below 1, a fraction of all steps. Ignored by "constant".
        max_steps: Total optimizer steps; -1 derives them from num_train_epochs.
        num_train_epochs: Passes over the data, used if max_steps is -1; may be fractional.
        per_device_train_batch_size: Samples per micro-batch, or groups of samples if the data has groups.
        gradient_accumulation_steps: Micro-batches per optimizer step.
        max_grad_norm: Clip the global gradient norm to this (torch's clip_grad_norm_); 0 or inf never clips.
        weight_decay: Decoupled, times learning rate, for adamw, lion, adafactor; in the gradient for sgd.
        optim: "adamw", "sgd", "lion" or "adafactor".
        adam_beta1, adam_beta2: Moment decays of adamw and lion.
        adam_epsilon: Added to the square root of adamw's second moment.
        momentum: Momentum of sgd.
        seed: Seed of shuffling, dropout and adapter initialization.
        max_length: Maximum tokens per sample; None means as many as fit one pack.
        truncation: How to handle longer samples. "right" keeps the first max_length tokens; the end token is lost and
            not replaced, so that the model does not learn to stop mid-answer. "left" keeps the last tokens, including
            the end token, after the begin token if there is one. "drop" omits the sample; "error" refuses the data,
            naming the line. Truncated and omitted samples are counted in the log and the first line of the metrics.
        pack_tokens: Rows of one pack, a multiple of PACK_ALIGN. Packs whose length matches a train bucket of the engine
            can share a forward with requests; others run in separate forwards. None means the engine's longest.
        completion_only_loss: Compute the loss on completions and assistant messages only; False uses every token.
        bf16, fp16: If True, refuse an engine that computes in another dtype (EngineConfig.dtype); False accepts any.
            The adapter's weights and optimizer state are always float32.
        shuffle: Use a new order each epoch, determined by (seed, epoch); False keeps the order of the data.
        loss: "cross_entropy", or a jax function of one pack's (logp [L], weights [L]) or (logp, weights, LossBatch)
            that returns the sum of its losses.
        loss_per: What the summed loss of an optimizer step is divided by: the number of "target" (tokens with loss),
            "sample" or "group" (see `Dataset.group_size`).
        eval_steps: Evaluate every so many steps; 0 only at the end. Needs eval data.
        early_stopping_patience: Stop after so many evaluations without improvement; 0 never stops early. Needs
            eval_steps.
        load_best_model_at_end: Serve and save the weights with the lowest evaluation loss instead of the last ones.
            Needs eval data. None means True with early stopping, which transformers requires there.
        early_stopping_threshold: Minimum decrease of the evaluation loss that counts as an improvement.
        logging_steps: Write a line to metrics.jsonl every so many steps (mean loss over them).
        save_steps: Checkpoint every so many steps; 0 never. Needs output_dir.
        save_total_limit: Number of checkpoints to keep.
        output_dir: Folder for metrics.jsonl and checkpoints; None writes no files.
    """

    learning_rate: float = 2e-4
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: float = 0
    max_steps: int = -1
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optim: Literal["adamw", "sgd", "lion", "adafactor"] = "adamw"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    momentum: float = 0.0
    seed: int = 42
    max_length: int | None = None
    truncation: Literal["right", "left", "drop", "error"] = "right"
    pack_tokens: int | None = None
    completion_only_loss: bool = True
    bf16: bool = False
    fp16: bool = False
    shuffle: bool = True
    loss: str | Callable[[Any, Any], Any] = "cross_entropy"
    loss_per: Literal["target", "sample", "group"] = "target"
    eval_steps: int = 0
    early_stopping_patience: int = 0
    early_stopping_threshold: float = 0.0
    load_best_model_at_end: bool | None = None
    logging_steps: int = 1
    save_steps: int = 0
    save_total_limit: int = 2
    output_dir: str | None = None

    borrowed: ClassVar[frozenset[str]]

    def __post_init__(self) -> None:
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            require(is_int(value) and least <= value < 2**32, name, value, f"an integer in [{least}, 2**32)")
        for name, bound in _NUMBERS.items():
            value, never = getattr(self, name), name == "max_grad_norm"
            ok = is_number(value) and (0 <= value < bound or (never and value == math.inf))
            require(ok, name, value, f"a number in [0, {bound}){' or inf' if never else ''}")
        self._check_choices()
        self._check_steps()
        self._check_lengths()

    def _check_choices(self) -> None:
        for name in ("completion_only_loss", "shuffle", "bf16", "fp16"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "a boolean")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(isinstance(value, str) and value in choices, name, value, f"one of {choices}")
        known = callable(self.loss) or (isinstance(self.loss, str) and self.loss == "cross_entropy")
        require(known, "loss", self.loss, "'cross_entropy' or a function")
        require(not (self.bf16 and self.fp16), "bf16", True, "false beside fp16")
        if callable(self.loss):
            takes_batch(self.loss)
        best = self.load_best_model_at_end
        require(best is None or isinstance(best, bool), "load_best_model_at_end", best, "a boolean or null")

    def _check_steps(self) -> None:
        steps = self.max_steps
        ok = is_int(steps) and (steps == -1 or 1 <= steps < 2**32)
        require(ok, "max_steps", steps, "-1 or an integer in [1, 2**32)")
        require(
            self.max_steps > 0 or self.num_train_epochs > 0,
            "num_train_epochs",
            self.num_train_epochs,
            "a number > 0 when max_steps is -1",
        )
        require(
            self.output_dir is None or (isinstance(self.output_dir, (str, Path)) and str(self.output_dir) != ""),
            "output_dir",
            self.output_dir,
            "a path or null",
        )
        patience = self.early_stopping_patience
        require(
            not patience or self.eval_steps,
            "early_stopping_patience",
            patience,
            f"0 with eval_steps {self.eval_steps}: only evaluations before the end can stop a job",
        )
        homeless = self.save_steps > 0 and self.output_dir is None
        require(not homeless, "save_steps", self.save_steps, "0 without output_dir")

    def _check_lengths(self) -> None:
        rows = self.pack_tokens
        aligned = rows is None or (is_int(rows) and rows >= PACK_ALIGN and rows % PACK_ALIGN == 0)
        require(aligned, "pack_tokens", rows, f"null or a multiple of {PACK_ALIGN}")
        most = math.inf if rows is None else rows + 1
        ok = self.max_length is None or (is_int(self.max_length) and 2 <= self.max_length <= most)
        require(ok, "max_length", self.max_length, f"null or an integer in [2, pack_tokens + 1 = {most}]")

    @property
    def keeps_best(self) -> bool:
        """load_best_model_at_end, resolved: None means whether early stopping is on."""
        best = self.load_best_model_at_end
        return self.early_stopping_patience > 0 if best is None else best

    @property
    def samples_per_step(self) -> int:
        """Samples per optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def pack_rows(self) -> int:
        """pack_tokens, or DEFAULT_PACK_TOKENS if None."""
        return self.pack_tokens or DEFAULT_PACK_TOKENS

    @property
    def sample_tokens(self) -> int:
        """Maximum tokens of one sample. n tokens take n - 1 rows, because the last token is only a target."""
        return self.max_length or self.pack_rows + 1

    def steps_per_epoch(self, num_samples: int) -> int:
        """Optimizer steps of one pass over `num_samples`; the last may be short, as in Trainer."""
        return -(-num_samples // self.samples_per_step)

    def total_steps(self, num_samples: int) -> int:
        """Total optimizer steps of the job, at least 1."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.num_train_epochs * self.steps_per_epoch(num_samples)))

    def check_dtype(self, dtype: str) -> None:
        """Raises ConfigError if bf16 or fp16 require a dtype other than `dtype`, the engine's."""
        for name, wanted in (("bf16", "bfloat16"), ("fp16", "float16")):
            fits = not getattr(self, name) or dtype == wanted
            require(fits, name, True, f"false: this engine computes in {dtype}, as set by EngineConfig.dtype")

    def check_evaluation(self, *, evaluates: bool) -> None:
        """Raises ConfigError if evaluations are configured but there is no eval_data (`evaluates` is False)."""
        best = self.load_best_model_at_end
        require(evaluates or not self.eval_steps, "eval_steps", self.eval_steps, "0 without eval_data")
        require(evaluates or not best, "load_best_model_at_end", best, "False without eval_data")

    def to_dict(self) -> dict[str, Any]:
        """JSON data; a loss function becomes "callable" and must be passed to `from_dict` again."""
        data = dataclasses.asdict(self)
        data["loss"] = CALLABLE_LOSS if callable(self.loss) else self.loss
        data["output_dir"] = None if self.output_dir is None else str(self.output_dir)
        return data

    @classmethod
    def from_dict(
        cls, data: dict[str, Any], *, loss: Callable[[Any, Any], Any] | None = None
    ) -> "TrainConfig":
        """The inverse of `to_dict`.

        Args:
            data: Fields by name.
            loss: The loss function, if the config was saved with one.

        Raises:
            ConfigError: an unknown key, a value that the class refuses, or a missing loss function.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key, value in data.items():
            require(key in known | cls.borrowed, key, value, f"one of the keys {sorted(known)}")
        if data.get("loss") == CALLABLE_LOSS:
            if loss is None:
                raise ConfigError("loss: got None, expected the loss function this job was started with")
            data = data | {"loss": loss}
        return cls(**data)


def learning_rate(cfg: TrainConfig, step: int, total_steps: int) -> float:
    """The learning rate of an optimizer step, on the host in double precision, rounded to float32.

    Args:
        cfg: The job's config.
        step: Optimizer step, from 0.
        total_steps: Total optimizer steps of the job.

    Returns:
        cfg.learning_rate times the multiplier of transformers' get_scheduler (transformers/optimization.py).
    """
    warmup = int(cfg.warmup_steps) if cfg.warmup_steps >= 1 else math.ceil(total_steps * cfg.warmup_steps)
    if cfg.lr_scheduler_type == "constant":
        scale = 1.0
    elif step < warmup:
        scale = step / max(1, warmup)
    elif cfg.lr_scheduler_type == "constant_with_warmup":
        scale = 1.0
    elif cfg.lr_scheduler_type == "linear":
        scale = max(0.0, (total_steps - step) / max(1, total_steps - warmup))
    else:
        progress = (step - warmup) / max(1, total_steps - warmup)
        scale = max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    return float(np.float32(cfg.learning_rate * scale))
