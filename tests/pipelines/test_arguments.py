"""What the pipelines hand on to the stock ones, what they choose themselves, and what they make of it."""

import inspect

import pytest
from diffusers import DDIMScheduler, DiffusionPipeline
from tiny_pixart import LINEAR_BETAS, pixart_pipeline

from diffusers_wadi import WaDiPipeline, WaDiPixArtPipeline, one_step_scheduler
from diffusers_wadi.pipelines import pipeline_wadi_pixart


@pytest.fixture(params=["sd", "pixart"])
def pipe(request, components):
    """Put together by hand, for one step."""
    if request.param == "sd":
        return WaDiPipeline(**components)
    return pixart_by_hand()


def pixart_by_hand() -> WaDiPixArtPipeline:
    parts = pixart_pipeline().components
    return WaDiPixArtPipeline(**parts | {"scheduler": one_step_scheduler(parts["scheduler"])})


@pytest.fixture
def handed_on(monkeypatch):
    """Call a pipeline, but instead of the stock `__call__` return its arguments and the scheduler at that time."""

    def call(pipe: DiffusionPipeline, *args, **options):
        seen = {}

        def stock(self, **arguments):
            seen.update(arguments=arguments, scheduler=self.scheduler)

        monkeypatch.setattr(pipe.stock_class, "__call__", stock)
        pipe(*args, **options)
        return seen["arguments"], seen["scheduler"]

    return call


def test_every_argument_of_the_stock_pipeline_reaches_it(pipe, handed_on):
    names = set(inspect.signature(pipe.stock_class.__call__).parameters) - {"self", "kwargs"}
    given = {name: object() for name in names} | {"timesteps": [999], "num_inference_steps": 1, "guidance_scale": 1.0}
    assert len(names) > 20
    arguments, _ = handed_on(pipe, **given, further="argument")
    assert arguments == given | {"further": "argument"}


def test_one_step_without_guidance_is_the_default(pipe, handed_on, said):
    arguments, scheduler = handed_on(pipe, "red")
    assert (arguments["num_inference_steps"], arguments["guidance_scale"]) == (1, 1.0) and said == []
    assert scheduler.config == pipe.scheduler.config


@pytest.mark.parametrize("times", [{"timesteps": [999, 500]}, {"sigmas": [0.9, 0.1]}])
def test_given_times_are_counted(pipe, handed_on, said, times):
    own = DDIMScheduler()
    pipe.scheduler.stands_for = own
    _, scheduler = handed_on(pipe, "red", **times)
    assert scheduler is own and len(said) == 1 and "num_inference_steps=2" in said[0]


def test_a_single_given_time_is_the_callers_business(pipe, handed_on, said):
    pipe.scheduler = DDIMScheduler(**LINEAR_BETAS)  # by itself it would take t = 1
    handed_on(pipe, "red", timesteps=[999])
    assert said == []
    handed_on(pipe, "red")
    assert len(said) == 1 and "would feed" in said[0]


def test_negative_embeddings_are_a_negative_prompt(pipe, handed_on, said):
    handed_on(pipe, prompt_embeds=object(), negative_prompt_embeds=object())
    assert len(said) == 1 and "negative prompt" in said[0]


@pytest.mark.parametrize("installed", [True, False])
def test_captions_are_cleaned_where_that_is_installed(handed_on, monkeypatch, installed):
    monkeypatch.setattr(pipeline_wadi_pixart, "is_bs4_available", lambda: True)
    monkeypatch.setattr(pipeline_wadi_pixart, "is_ftfy_available", lambda: installed)
    assert handed_on(pixart_by_hand(), "red")[0]["clean_caption"] is installed


@pytest.mark.parametrize("sample_size, binned", [(8, False), (64, True)])
def test_sizes_are_binned_where_there_are_bins(handed_on, sample_size, binned):
    pipe = pixart_by_hand()
    pipe.transformer.register_to_config(sample_size=sample_size)
    assert handed_on(pipe, "red")[0]["use_resolution_binning"] is binned
