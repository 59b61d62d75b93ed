"""How the driver says no to Nova."""

from nova import exception


class Refused(exception.InstanceFaultRollback):
    """An operation that did not begin: Nova leaves the server's state as it was, and shows the sentence as fault."""

    def __init__(self, sentence: str) -> None:
        super().__init__(inner_exception=exception.NovaException(sentence))
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence
