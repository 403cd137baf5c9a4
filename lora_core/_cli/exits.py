"""The exit codes, and what they mean."""

DONE = 0
ERROR = 1
USAGE = 2
DIFFERENT = 3
FAULT = 70
INTERRUPTED = 130
BROKEN_PIPE = 141

MEANINGS = {
    DONE: "done; of `diff`: the same function",
    ERROR: "an error that is yours to repair, which one sentence on stderr says how",
    USAGE: "the words make no command",
    DIFFERENT: "of `diff`: not the same function",
    FAULT: "a fault of the program itself; --debug shows where",
    INTERRUPTED: "stopped by Ctrl-C",
    BROKEN_PIPE: "whoever read the output closed it",
}
