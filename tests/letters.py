"""A tokenizer of one id per letter, for tests that count tokens by hand."""

from jaxllm.data.tokenizers import Tokenizer


class Letters(Tokenizer):
    """One id per byte of ASCII text, plus BOS 128 and EOS 129."""

    vocab_size, bos_id, eos_id = 130, 128, 129

    def encode(self, text, bos=True, eos=False):
        return self._with_eos([self.bos_id] * bos + list(text.encode("ascii")), eos)

    def decode(self, ids):
        return bytes(i for i in self._checked(ids) if i < 128).decode("ascii")

    @property
    def fingerprint(self):
        return "letters"

    def save(self, folder):
        raise NotImplementedError("made by the tests")
