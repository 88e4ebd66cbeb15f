"""The photographs of a training run: which there are, which are held out, and which cannot be read."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pyramid_ldm.config.autoencoder import ImageDataConfig
from pyramid_ldm.data.batch import BadFile, Batch
from pyramid_ldm.data.folder import Folder, ImageFile, fingerprint, scan, split_held_out, too_many_bad, with_known
from pyramid_ldm.data.loading import load_batches
from pyramid_ldm.data.photographs import Photographs, Preprocessing, collate_images
from pyramid_ldm.errors import UserError
from pyramid_ldm.training.log import RunLog
from pyramid_ldm.training.runtime import Runtime


class TrainingPhotographs:
    """A folder, scanned. `begin` has to follow with what a resumed run knows of it."""

    def __init__(self, data: ImageDataConfig, image_size: Sequence[int], seed: int, runtime: Runtime) -> None:
        self.data, self.seed, self.runtime = data, seed, runtime
        self.folder: Folder = runtime.first(lambda: scan(Path(data.root)))
        size = image_size[0], image_size[1]
        self.files, notes = self.folder.large_enough(size, data.upscale)
        self.notes = [*self.folder.notes(), *notes]
        self.present = {file.digest for file in self.files}
        self.preprocessing = Preprocessing(size, data.crop, data.zoom, data.flip, data.upscale)
        self.bad: dict[str, str] = {}  # no images: digest, message
        self.gone: set[str] = set()  # others that could not be opened; found anew at every start

    def begin(self, bad: dict[str, str]) -> None:
        """`bad`, which grows, are those that turned out to be no images; they keep their places."""
        self.bad = bad
        self.notes += [f"skipped {bad[file.digest]}" for file in self.files if file.digest in bad]
        files = with_known(self.files, bad)
        self.fingerprint = fingerprint(files)
        self.train, self.held_out = split_held_out(files, self.data.validation)

    def batches(self, positions: Iterable[list[int]]) -> Iterator[Batch]:
        """To train on."""
        photographs = Photographs(self.train, self.preprocessing, self.seed, self.bad)
        pin = self.runtime.device.type == "cuda"
        return load_batches(photographs, collate_images, positions, workers=self.data.workers, pin=pin)

    def to_examine(self, files: Sequence[ImageFile], positions: Iterable[list[int]]) -> Iterator[Batch]:
        """Some of these files, cut as training cuts them, in this process."""
        photographs = Photographs(files, self.preprocessing, self.seed, self.bad)
        return (collate_images([photographs[position] for position in part]) for part in positions)

    def received(self, found: Sequence[BadFile], log: RunLog) -> None:
        """Names each file that was skipped, once, from the process that met it."""
        for bad in found:
            if bad.digest in self.bad or bad.digest in self.gone:
                continue
            log.warn(f"skipped {bad.message}")
            if bad.of_content:
                self.bad[bad.digest] = bad.message
            else:
                self.gone.add(bad.digest)

    def fault(self) -> UserError | None:
        """Where more than `max_bad_fraction` of them cannot be read here."""
        unreadable = len(self.folder.unreadable)
        bad = len(self.present & (self.bad.keys() | self.gone)) + unreadable
        share = self.data.max_bad_fraction
        return too_many_bad(self.data.root, bad, len(self.present) + unreadable, share, "data.max_bad_fraction")

    def refuse(self) -> UserError | None:
        """Where more than `max_bad_fraction` of them cannot be read, on any process."""
        error = self.fault()
        if not self.runtime.any(error is not None):
            return None
        message = f"{self.data.root}: another process met more bad images than data.max_bad_fraction allows"
        return error or UserError(message)
