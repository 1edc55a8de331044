"""What is run on the day, in which order, and how long each step may take."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        part: A, is it right? Or B, how fast is it? A step of both runs in whichever comes first.
        seconds: after which it is killed.
        function: ``module:function`` of this package, which is given a ``process.Run``.
    """

    name: str
    part: str
    seconds: int
    function: str


STEPS = (
    Step("machine", "AB", 20, "machine:machine"),
    Step("cases", "A", 90, "cases:cases"),
    Step("tests", "A", 120, "kernel_tests:kernel_tests"),
    Step("sanitizer", "A", 90, "sanitizer:sanitizer"),
    Step("graphs", "A", 85, "decoder:graphs"),
    Step("limits", "B", 20, "machine:limits"),
    Step("compile", "B", 75, "speed:compile_everything"),
    Step("linears", "B", 55, "speed:linears"),
    Step("tiles", "B", 55, "speed:tiles"),
    Step("decodes", "B", 50, "speed:decodes"),
    Step("decoder", "B", 100, "decoder:decoder"),
    Step("counters", "B", 35, "counters:counters"),
)
# Processes that another step starts.
INNER = (
    Step("sanitized", "", 90, "sanitizer:sanitized"),
    Step("counted", "", 35, "counters:counted"),
)
PARTS = ("A", "B")
SECONDS_OF_A_PART = 7 * 60
BY_NAME = {step.name: step for step in (*STEPS, *INNER)}
