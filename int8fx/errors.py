"""What a user can put right."""

import importlib.metadata


class UserError(Exception):
    """Names what was given and what is allowed; the command shows it as one line."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that does not fit the model, or is damaged: names the tensor."""


class ReleaseError(UserError, ImportError):
    """A release of another library that lacks what int8fx needs of it; both are named."""

    def __init__(self, library: str, oldest: str) -> None:
        found = importlib.metadata.version(library)
        super().__init__(f"int8fx needs {library} >= {oldest}, and this is {library} {found}")


class CalibrationError(UserError, ValueError):
    """A calibration that is of another model, or damaged: names what differs."""


class ArtefactError(UserError, ValueError):
    """A folder of ``int8fx compile`` that cannot run here: names the file, or what does not match."""


class BudgetError(UserError, ValueError):
    """A budget that no choice of options keeps."""


class ReleasedWeightError(RuntimeError):
    """A weight that only a compiled graph may read, see ``int8fx/compiler/release.py``."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} was released: torch.compile with options={{'release_weights': True}} keeps it in "
            "int8, for what was compiled alone. int8fx.quantize_(model) lets everything read it in "
            "int8; int8fx.dequantize_(model) brings back a float weight, rounded as it is; its exact "
            "values are in the checkpoint, for model.load_state_dict after dequantize_"
        )


# What quantises float weights says of others, behind the model's name.
QUANTISED = ": its weights are quantised already; give a float model"
