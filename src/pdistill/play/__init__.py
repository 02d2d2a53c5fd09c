"""`pdistill play`: denoisers side by side from the same noise, on a local page.

`lineup` is which denoisers, `drawing` what they draw, `turns` who draws when, `page` what a browser shows (Gradio).
"""
