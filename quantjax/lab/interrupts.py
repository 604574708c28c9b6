"""What an interrupted command says of its files; `quantjax_command` ends it."""

STATUS = 130  # what shells give for Ctrl-C

on_disk = "nothing was written"


def tell(what: str):
    """Sets what is on disk by now."""
    global on_disk
    on_disk = what
