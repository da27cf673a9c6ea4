"""The demo as a Gradio Space, or on your own machine:

    pip install "diffusers-wadi[demo]"
    python examples/gradio_space/app.py

The application is `diffusers_wadi.demo`. Its settings are environment variables: WADI_MODEL, WADI_BASE_MODEL,
WADI_WEIGHT_NAME, WADI_CONTROLNET, WADI_DEVICE, WADI_DTYPE, and the limits in `DemoSettings`.
"""

from diffusers_wadi.demo import launch

if __name__ == "__main__":
    launch()
