"""`python -m bdlib.exercises`: see `bdlib.exercises.students.main`."""

import sys

from bdlib.exercises.students import main

sys.exit(main())
