"""The demo: tiny trained models in the real formats, the worlds they live in, and their alignment.

`chat_*` and `scene_*` are the two worlds (prompts, known reward, preference pairs); `run` aligns
both shipped models through the same `align()` that everybody calls. The known reward makes the
pairs and evaluates; nothing is trained on it directly.
"""
