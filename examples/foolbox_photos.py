"""Lay out the 20 labelled ImageNet photographs of the package foolbox as a data set: python
examples/foolbox_photos.py PHOTOS

Writes PHOTOS/images/<class number>/*.jpg and PHOTOS/class_map.txt, whose lines are the classes 0 ... 999.
"""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

spec = find_spec("foolbox")
if spec is None or spec.origin is None:
    sys.exit("foolbox is not installed: pip install 'certipatch[photos]'")
to = Path(sys.argv[1] if len(sys.argv) > 1 else "photos")
for photo in sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg")):
    label = photo.stem.split("_")[2]  # imagenet_<running number>_<class number>.jpg
    (to / "images" / label).mkdir(parents=True, exist_ok=True)
    shutil.copy(photo, to / "images" / label / photo.name)
(to / "class_map.txt").write_text("".join(f"{label}\n" for label in range(1000)))
print(f"{len(list((to / 'images').glob('*/*.jpg')))} photographs in {to / 'images'}")
