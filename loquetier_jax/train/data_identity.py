"""Identifies a job's data by a hash of its records and a hash of their tokens. No jax."""

from loquetier_jax.errors import CheckpointError
from loquetier_jax.train.data import Dataset


def data_identity(data: Dataset | None) -> dict[str, str | None] | None:
    """The hashes that a checkpoint stores for a dataset, as JSON data; None without a dataset."""
    return None if data is None else {"records": data.records, "tokens": data.fingerprint}


def check_same_data(name: str, given: Dataset | None, saved: dict[str, str | None] | None) -> None:
    """Checks that a job continues with the data that it was started with.

    Args:
        name: "data" or "eval_data", for error messages.
        given: The data to continue with; only eval_data may be None.
        saved: From `data_identity`.

    Raises:
        CheckpointError: different data, or the same records but different tokens from this tokenizer.
    """
    got, want = data_identity(given), saved
    if got is None and want is None:
        return
    if got is None:
        raise CheckpointError(f"{name}: got None, expected the job's evaluation data")
    if want is None:
        raise CheckpointError(f"{name}: got data, expected None: the job has none")
    if got["tokens"] == want["tokens"]:
        return
    if got["records"] and got["records"] == want.get("records"):
        raise CheckpointError(
            f"{name}: the records match, but this tokenizer gives different tokens: expected the tokenizer and chat "
            "template that the job was started with"
        )
    hashes = f"got hash {got['tokens']:.12}, expected {want['tokens']:.12}"
    raise CheckpointError(f"{name}: {hashes}: not the data of the job")
