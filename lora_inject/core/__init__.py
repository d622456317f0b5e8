"""The main job: choose, plan, change, remember, undo."""
