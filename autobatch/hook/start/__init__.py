"""The one folder that comes first on a command's ``PYTHONPATH``: whatever lay here could hide a module of its own."""
