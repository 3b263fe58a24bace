"""A plugin of pytest: its processes have the absent GPU too."""

from . import absent

absent.enter()
