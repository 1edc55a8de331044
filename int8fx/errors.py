"""What a user can put right."""


class UserError(Exception):
    """Names what was given and what is allowed; the command shows it as one line."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that does not fit the model, or is damaged: names the tensor."""


class BudgetError(UserError, ValueError):
    """A budget that no choice of options keeps."""


# What quantises float weights says of others, behind the model's name.
QUANTISED = ": its weights are quantised already; give a float model"
