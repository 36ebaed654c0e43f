"""Which data a job was started on: a hash of its records, and one of what the tokenizer made of them. No jax."""


from loquetier_jax.errors import CheckpointError
from loquetier_jax.jobs.data import Dataset


def data_identity(data: Dataset | None) -> dict[str, str | None] | None:
    """What a checkpoint remembers of a data set, as JSON data; None of none."""
    return None if data is None else {"records": data.records, "tokens": data.fingerprint}


def check_same_data(name: str, given: Dataset | None, saved: dict[str, str | None] | None) -> None:
    """Checks that a job goes on with the data that it was started on.

    Args:
        name: "data" or "eval_data", for messages.
        given: What it is to go on with.
        saved: From `data_identity`.

    Raises:
        CheckpointError: other data; or the same records, of which this tokenizer makes other tokens.
    """
    got, want = data_identity(given) or {}, saved or {}
    if got.get("tokens") == want.get("tokens"):
        return
    if got.get("records") and got.get("records") == want.get("records"):
        raise CheckpointError(
            f"{name}: got the job's records, but other tokens of them than when it was started: expected the same "
            "tokenizer and chat template"
        )
    hashes = [str(one.get("tokens")) for one in (got, want)]
    raise CheckpointError(f"{name}: got hash {hashes[0]:.12}, expected {hashes[1]:.12}: not the data of the job")
