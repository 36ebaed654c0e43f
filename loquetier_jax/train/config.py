"""How a job trains: one frozen dataclass under TRL's names, and each step's learning rate. Imports no jax."""

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
CALLABLE_LOSS = "callable"  # stands for a loss function in a saved config; restoring is given it again

_MOST = float(np.finfo(np.float32).max)  # beyond it a number is infinite on the device
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
_NUMBERS = {  # field: what it is below; all are >= 0
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
    """How one job trains. Names and meanings: TRL's SFTConfig, transformers' TrainingArguments.

    Their other arguments are taken where they ask for what is done anyway (`warmup_ratio`, `optim="adamw_torch"`,
    `report_to="none"`, `gradient_checkpointing`), and refused in a sentence otherwise; see `train.trl_arguments`.

    Attributes:
        learning_rate: Peak learning rate.
        lr_scheduler_type: "constant", "constant_with_warmup", "linear" or "cosine", as in transformers.
        warmup_steps: Optimizer steps of linear warm-up; below 1, a share of all steps. "constant" has none.
        max_steps: Optimizer steps in all; -1 derives them from num_train_epochs.
        num_train_epochs: Passes over the data, used when max_steps is -1; may be fractional.
        per_device_train_batch_size: Samples of one micro-batch; groups of samples where the data has such.
        gradient_accumulation_steps: Micro-batches of one optimizer step.
        max_grad_norm: Clip the global gradient norm to this (torch's clip_grad_norm_); 0 or inf never clips.
        weight_decay: Decoupled, times learning rate, for adamw, lion, adafactor; in the gradient for sgd.
        optim: "adamw", "sgd", "lion" or "adafactor".
        adam_beta1, adam_beta2: Moment decays of adamw and lion.
        adam_epsilon: Added to the root of adamw's second moment.
        momentum: Of sgd.
        seed: Of shuffling, dropout and adapter initialization.
        max_length: Maximum tokens per sample. None: as many as one pack holds.
        truncation: What becomes of a longer sample. "right" keeps its first max_length tokens. Its end is gone then,
            and its end token with it: none is put in its place, so that the model does not learn to stop
            mid-answer. "left" keeps its last tokens, the end token among them, behind its begin token where it has one.
            "drop" leaves the sample out, "error" refuses the data, naming the line. What is cut or left out is counted,
            logged, and in the first line of the metrics.
        pack_tokens: Rows of one pack, a multiple of PACK_ALIGN. Packs of a length that a train bucket of the
            engine has can ride beside requests in one forward; others run in forwards of their own. None: the
            engine's longest.
        completion_only_loss: Learn completions and assistant messages only; False learns every token.
        bf16, fp16: True refuses an engine that computes in another dtype (EngineConfig.dtype); weights and optimizer
            state of the adapter are float32 in any case. False leaves it to the engine.
        shuffle: A new order each epoch, from (seed, epoch); False keeps the order of the data.
        loss: "cross_entropy", or a function in jax of one pack's (logp [L], weights [L]), or of those and its LossBatch
            (samples, and what they brought along), that returns the sum of its losses.
        loss_per: What the summed losses of an optimizer step are divided by, their number of: "target" (tokens that
            are learnt), "sample", or "group" (see `Dataset.group_size`).
        eval_steps: Evaluate every so many steps; 0 only at the end. Needs eval data.
        early_stopping_patience: Stop after so many evaluations without improvement; 0 never stops early. Needs
            eval_steps.
        load_best_model_at_end: Serve and save the weights of the lowest evaluation loss, not the last ones. Needs eval
            data. None: with early stopping, as transformers asks for.
        early_stopping_threshold: By how much the evaluation loss must fall to count as an improvement.
        logging_steps: Write a line to metrics.jsonl every so many steps (mean loss over them).
        save_steps: Checkpoint every so many steps; 0 never. Needs output_dir.
        save_total_limit: Committed checkpoints kept.
        output_dir: Folder of metrics.jsonl and checkpoints; None writes no file.
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
        """load_best_model_at_end, where None follows early stopping."""
        best = self.load_best_model_at_end
        return self.early_stopping_patience > 0 if best is None else best

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def pack_rows(self) -> int:
        """pack_tokens, DEFAULT_PACK_TOKENS where no engine has filled it in."""
        return self.pack_tokens or DEFAULT_PACK_TOKENS

    @property
    def sample_tokens(self) -> int:
        """Most tokens of one sample. n tokens take n - 1 rows: the last token is only ever a target."""
        return self.max_length or self.pack_rows + 1

    def steps_per_epoch(self, num_samples: int) -> int:
        """Optimizer steps of one pass over `num_samples`; the last may be short, as in Trainer."""
        return -(-num_samples // self.samples_per_step)

    def total_steps(self, num_samples: int) -> int:
        """Optimizer steps of the whole job, at least 1."""
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.num_train_epochs * self.steps_per_epoch(num_samples)))

    def check_dtype(self, dtype: str) -> None:
        """Raises ConfigError where bf16 or fp16 ask for another dtype than `dtype`, the engine's."""
        for name, wanted in (("bf16", "bfloat16"), ("fp16", "float16")):
            fits = not getattr(self, name) or dtype == wanted
            require(fits, name, True, f"false: this engine computes in {dtype}, as set by EngineConfig.dtype")

    def check_evaluation(self, *, evaluates: bool) -> None:
        """Raises ConfigError where evaluations are asked for and there is no eval_data: not `evaluates`."""
        best = self.load_best_model_at_end
        require(evaluates or not self.eval_steps, "eval_steps", self.eval_steps, "0 without eval_data")
        require(evaluates or not best, "load_best_model_at_end", best, "False without eval_data")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; a loss function becomes the word "callable" and is passed again to `from_dict`."""
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
            loss: The loss function of a config that was saved with one.

        Raises:
            ConfigError: an unknown key, a value the class refuses, or a loss function not given again.
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
        step: Optimizer step, counted from 0.
        total_steps: Optimizer steps of the whole job.

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
