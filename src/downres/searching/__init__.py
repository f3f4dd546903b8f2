"""The main job and its parts: plan, run, store, select."""
