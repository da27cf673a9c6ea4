"""Adapters and pipelines from and to the Hub: the real client against a stand-in server."""

import hashlib
import io
import json
import shutil

import pytest
import torch
import yaml
from conftest import add_random_adapter
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from hub_server import READ, WRITE, HubServer
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save

from diffusers_wadi import CardDetails, LoRaDLoaderMixin, WaDiPipeline, load_lorad_adapter, save_lorad_adapter

WEIGHTS = "pytorch_lorad_weights.safetensors"


class StockPipeline(LoRaDLoaderMixin, StableDiffusionPipeline):
    pass


@pytest.fixture
def pipe(components):
    return WaDiPipeline(**components)


@pytest.fixture
def published(hub, adapter_folder, base_folder, tmp_path):
    """ "org/base", and "org/student" whose config names it."""
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    name_base(folder, "org/base")
    hub.add("org/base", base_folder)
    hub.add("org/student", folder)
    return hub


def name_base(folder, base):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def latents(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}
    return pipe("red blue", generator=generator, **options).images


def predict(unet):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    text = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return unet(z, 999, text).sample


def variation(adapter_folder, folder, factor):
    """The adapter with its angles multiplied."""
    shutil.copytree(adapter_folder, folder)
    tensors = load_file(adapter_folder / WEIGHTS)
    tensors = {key: tensor * factor if key.endswith("_A") else tensor for key, tensor in tensors.items()}
    (folder / WEIGHTS).write_bytes(save(tensors))
    return folder


# ------------------------------------------------------------------------------------------------------------- loading


def test_an_adapter_and_its_base_by_name_then_from_the_cache(published, adapter_folder, monkeypatch):
    expected = latents(WaDiPipeline.from_pretrained(adapter_folder))
    assert torch.equal(latents(WaDiPipeline.from_pretrained("org/student")), expected)
    asked = len(published.requests)
    again = WaDiPipeline.from_pretrained("org/student", local_files_only=True)
    assert torch.equal(latents(again), expected) and len(published.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(latents(WaDiPipeline.from_pretrained("org/student")), expected)
    assert len(published.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    published.close()  # no answer at all
    assert torch.equal(latents(WaDiPipeline.from_pretrained("org/student")), expected)


def test_revisions_subfolders_and_a_cache_of_one_s_own(published, pipe, adapter_folder, tmp_path):
    first = published.repositories["org/student"].refs["main"]
    published.repositories["org/student"].refs["v1"] = first
    published.add("org/student", variation(adapter_folder, tmp_path / "twice", 2.0))
    published.add("org/student", variation(adapter_folder, tmp_path / "half", 0.5), under="small/")
    seen = {}
    for name, options in {
        "v1": {"revision": "v1"},
        "sha": {"revision": first, "cache_dir": tmp_path / "mine"},
        "main": {},
        "small": {"subfolder": "small"},
    }.items():
        pipe.load_lorad_weights("org/student", adapter_name=name, **options)
        seen[name] = predict(pipe.unet)
    assert torch.equal(seen["v1"], seen["sha"]) and (tmp_path / "mine" / "models--org--student").is_dir()
    assert not torch.equal(seen["v1"], seen["main"]) and not torch.equal(seen["main"], seen["small"])
    load_lorad_adapter(pipe.unet, adapter_folder, "local")
    assert torch.equal(predict(pipe.unet), seen["v1"])


def test_a_private_repository_and_where_its_token_goes(published, pipe, adapter_folder):
    published.repositories["org/student"].private = True
    before = predict(pipe.unet)
    for token in (None, "hf_wrong"):
        with pytest.raises(OSError, match="401.*pass token="):
            pipe.load_lorad_weights("org/student", token=token)
    assert torch.equal(predict(pipe.unet), before) and not pipe.get_list_adapters()
    pipe.load_lorad_weights("org/student", token=READ)
    assert published.seen("HEAD /org/student/resolve/main/pytorch")[-1]["authorization"] == f"Bearer {READ}"
    storage = published.seen("GET /[0-9a-f]{64}$")
    assert storage and not any("authorization" in headers for headers in storage)
    whole = WaDiPipeline.from_pretrained("org/student", token=READ)
    assert torch.equal(predict(whole.unet), predict(pipe.unet))


def test_a_base_inside_the_adapter_s_repository(hub, adapter_folder, base_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(adapter_folder, tmp_path / "adapter")
    name_base(folder, "teacher")
    hub.add("org/both", folder)
    hub.add("org/both", base_folder, under="teacher/")
    hub.repositories["org/both"].refs["v1"] = hub.repositories["org/both"].refs["main"]
    hub.repositories["org/both"].commit({"teacher/unet/config.json": b"{}"})  # what main has does not concern v1
    expected = latents(WaDiPipeline.from_pretrained(adapter_folder))
    assert torch.equal(latents(WaDiPipeline.from_pretrained("org/both", revision="v1")), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(latents(WaDiPipeline.from_pretrained("org/both", revision="v1")), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.add("org/deep", folder, under="students/one/")
    hub.add("org/deep", base_folder, under="students/one/teacher/")
    assert torch.equal(latents(WaDiPipeline.from_pretrained("org/deep", subfolder="students/one")), expected)


def test_complete_pipelines(hub, pipe, base_folder, tmp_path):
    expected = latents(WaDiPipeline.from_pretrained(base_folder))
    repository = hub.add("org/whole", base_folder)
    repository.refs["v1"] = repository.refs["main"]
    add_random_adapter(pipe.unet)
    pipe.save_pretrained(tmp_path / "other")
    hub.add("org/whole", tmp_path / "other")
    hub.add("org/whole", base_folder, under="deeper/")
    assert torch.equal(latents(WaDiPipeline.from_pretrained("org/whole", revision="v1")), expected)
    assert torch.equal(latents(WaDiPipeline.from_pretrained("org/whole", subfolder="deeper")), expected)
    torch.testing.assert_close(latents(WaDiPipeline.from_pretrained("org/whole")), latents(pipe), rtol=1e-4, atol=1e-3)


def test_what_is_not_there(published, pipe):
    before = predict(pipe.unet)
    published.add("org/empty", **{"README.md": b"nothing"})
    for name, options, message in (
        ("org/nowhere", {}, "Repository Not Found.*Check the spelling"),
        ("org/student", {"revision": "v9"}, "Revision Not Found"),
        ("org/student", {"subfolder": "deeper"}, "no pytorch_lorad_weights.safetensors in 'org/student/deeper'"),
        ("org/empty", {}, "no pytorch_lorad_weights.safetensors in 'org/empty'; .*weight_name="),
        ("not a name", {}, "not a folder here, nor a usable Hub name"),
    ):
        with pytest.raises(OSError, match=message):
            pipe.load_lorad_weights(name, **options)
    with pytest.raises(OSError, match="'org/empty' holds neither model_index.json .* nor adapter_config.json"):
        WaDiPipeline.from_pretrained("org/empty")
    with pytest.raises(ValueError, match="safetensors only"):
        pipe.load_lorad_weights("org/student", weight_name="pytorch_lora_weights.bin")
    assert not published.seen(r"\.bin")  # not even looked for
    with pytest.raises(ValueError, match="leaves 'org/student'"):
        pipe.load_lorad_weights("org/student", weight_name="../../etc/x.safetensors")
    assert torch.equal(predict(pipe.unet), before) and not pipe.get_list_adapters()


# -------------------------------------------------------------------------------------------------------------- faults


def test_the_client_tries_again(published, pipe, adapter_folder, monkeypatch):
    """429 with a time to wait for, and a connection that breaks in the middle of the file."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 250)  # what it keeps of a file is whole chunks
    published.fault("HEAD .*adapter_config", status=429, headers={"Retry-After": "3"}, times=2)
    published.fault("GET /[0-9a-f]{64}$", status=429, headers={"Retry-After": "3"})
    published.fault("GET /[0-9a-f]{64}$", cut=1000)
    pipe.load_lorad_weights("org/student", adapter_name="far")
    assert published.seen("GET /[0-9a-f]{64}$")[-1]["range"] == "bytes=1000-"  # goes on where it broke
    far = predict(pipe.unet)
    load_lorad_adapter(pipe.unet, adapter_folder, "near")
    assert torch.equal(predict(pipe.unet), far)


@pytest.mark.parametrize(
    "pattern, what, message",
    [
        ("adapter_config", {"status": 401}, "401"),
        ("HEAD ", {"status": 503}, "not in the local cache and could not be downloaded"),
        ("resolve/main/pytorch", {"status": 500}, "not in the local cache and could not be downloaded"),
        ("GET /[0-9a-f]{64}$", {"status": 404}, "404"),
        ("GET /[0-9a-f]{64}$", {"cut": 100}, "'org/student' is not a folder here, nor a usable Hub name: .*Check"),
        ("GET /[0-9a-f]{64}$", {"truncate": 100}, "file should be of size"),
    ],
)
def test_lasting_faults_are_errors_and_change_nothing(published, pipe, pattern, what, message):
    before = predict(pipe.unet)
    published.fault(pattern, **what, times=99)
    with pytest.raises(OSError, match=message):
        pipe.load_lorad_weights("org/student")
    assert torch.equal(predict(pipe.unet), before) and not pipe.get_list_adapters()
    published.faults.clear()
    pipe.load_lorad_weights("org/student")  # nothing broken was left in the cache
    assert not torch.equal(predict(pipe.unet), before)


def test_a_line_that_breaks_in_the_base(published):
    published.fault("GET /[0-9a-f]{64}$", cut=100, times=99)
    with pytest.raises(OSError, match="cannot load the pipeline 'org/base'"):
        WaDiPipeline.from_pretrained("org/student")
    published.faults.clear()
    WaDiPipeline.from_pretrained("org/student")


def test_a_file_that_was_uploaded_in_part(published, pipe):
    before = predict(pipe.unet)
    content = published.repositories["org/student"].files[WEIGHTS]
    published.add("org/student", **{WEIGHTS: content[: len(content) // 2]})
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        pipe.load_lorad_weights("org/student")
    assert torch.equal(predict(pipe.unet), before)


# ----------------------------------------------------------------------------------------------------------- uploading


def card_of(repository):
    text = repository.files["README.md"].decode()
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


def test_push_an_adapter_and_load_it_back(hub, pipe, base_folder, adapter_folder):
    hub.add("org/base", base_folder)
    pipe.load_lorad_weights(adapter_folder, adapter_name="mine")
    base = {"base_model_name_or_path": "org/base"}
    details = CardDetails(
        steps=4000, data="captions", license="apache-2.0", training={"Batch | size": 8}, prompts=["red", "blue"]
    )
    pipe.push_lorad_to_hub("me/student", private=True, token=WRITE, commit_message="first", card=details, **base)
    repository = hub.repositories["me/student"]
    assert repository.private and repository.messages[-1] == "first"
    wanted = {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        "samples.png",
        "scheduler/scheduler_config.json",
    }
    assert set(repository.files) == wanted
    assert hashlib.sha256(repository.files[WEIGHTS]).hexdigest() in hub.large  # it went by the storage
    data, body = card_of(repository)
    assert data["tags"] == ["lorad", "wadi", "one-step", "text-to-image", "diffusers"]
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/base", "adapter", "apache-2.0")
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "text-to-image")
    for part in ("rank 4", "4000", "captions", "Batch \\| size", '"red"; "blue"', "![Samples](samples.png)"):
        assert part in body, part
    assert 'WaDiPipeline.from_pretrained("me/student")' in body and "num_inference_steps=1, guidance_scale=0" in body
    assert Image.open(io.BytesIO(repository.files["samples.png"])).size == (128, 64)
    back = WaDiPipeline.from_pretrained("me/student", token=READ)
    assert torch.equal(predict(back.unet), predict(pipe.unet))


def test_a_card_that_somebody_wrote_stays(hub, pipe, adapter_folder, tmp_path):
    pipe.load_lorad_weights(adapter_folder, adapter_name="mine")
    folder, options = tmp_path / "out", {"push_to_hub": True, "repo_id": "org/x", "token": WRITE}
    options["base_model_name_or_path"] = "org/base"
    pipe.save_lorad_weights(folder, **options)
    assert "Training steps" not in (folder / "README.md").read_text()
    pipe.save_lorad_weights(folder, card=CardDetails(steps=77), **options)  # ours: written anew
    assert "| Training steps | 77 |" in card_of(hub.repositories["org/x"])[1]
    assert (folder / "README.md").read_bytes() == hub.repositories["org/x"].files["README.md"]
    hub.repositories["org/x"].commit({"README.md": b"# Theirs"})
    shutil.rmtree(folder)
    pipe.save_lorad_weights(folder, card=CardDetails(steps=78), **options)
    assert hub.repositories["org/x"].files["README.md"] == b"# Theirs" and not (folder / "README.md").exists()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# By hand")
    (folder / "private.txt").touch()
    pipe.save_lorad_weights(folder, **options)
    assert hub.repositories["org/x"].files["README.md"].endswith(b"# By hand")
    assert "private.txt" not in hub.repositories["org/x"].files


def test_pull_requests_subfolders_and_what_does_not_change(hub, pipe, adapter_folder):
    pipe.load_lorad_weights(adapter_folder, adapter_name="mine")
    options = {"token": WRITE, "base_model_name_or_path": "org/base"}
    pipe.push_lorad_to_hub("org/x", **options)
    commits = len(hub.repositories["org/x"].commits)
    pipe.push_lorad_to_hub("org/x", **options)
    assert len(hub.repositories["org/x"].commits) == commits  # nothing new, no commit
    pipe.push_lorad_to_hub("org/x", subfolder="deep/er", create_pr=True, **options)
    assert "deep/er/adapter_config.json" not in hub.repositories["org/x"].files
    there = hub.repositories["org/x"].commits[hub.repositories["org/x"].refs["refs/pr/1"]]
    assert f"deep/er/{WEIGHTS}" in there and "deep/er/README.md" not in there


def test_pushes_that_are_refused(hub, pipe, adapter_folder, base_folder, tmp_path):
    pipe.load_lorad_weights(adapter_folder, adapter_name="mine")
    base = {"base_model_name_or_path": "org/base"}
    for repository, token, message in (
        ("org/x", None, "cannot upload to 'org/x': .*Invalid username or password.*hf auth login"),
        ("org/x", READ, "no right to write.*pass token="),
        ("others/x", WRITE, "no right to create repositories in others"),
    ):
        with pytest.raises(OSError, match=message):
            pipe.push_lorad_to_hub(repository, token=token, **base)
    hub.fault("PUT ", status=403, times=99)
    with pytest.raises(OSError, match=f"cannot upload to 'org/x': .*{WEIGHTS}.*403"):
        pipe.push_lorad_to_hub("org/x", token=WRITE, **base)
    assert set(hub.repositories["org/x"].files) == {".gitattributes"}
    asked = len(hub.requests)
    for local in (base_folder, "./base", "~/base"):
        with pytest.raises(ValueError, match="a folder of this machine. Pass base_model_name_or_path="):
            pipe.push_lorad_to_hub("org/x", token=WRITE, base_model_name_or_path=str(local))
    with pytest.raises(ValueError, match="a folder of this machine"):  # where the pipeline itself came from
        WaDiPipeline.from_pretrained(adapter_folder).push_lorad_to_hub("org/x", token=WRITE)
    assert len(hub.requests) == asked


def test_push_a_whole_pipeline(hub, pipe, tmp_path):
    add_random_adapter(pipe.unet)
    expected, half = latents(pipe), pipe.to(torch.float16)
    folder = tmp_path / "name"
    folder.mkdir()
    (folder / "private.txt").touch()
    half.save_pretrained(folder, push_to_hub=True, token=WRITE, private=True)
    repository = hub.repositories["me/name"]
    assert repository.private and "private.txt" not in repository.files
    assert json.loads(repository.files["text_encoder/config.json"])["dtype"] == "float32"
    data, body = card_of(repository)
    assert "base_model" not in data and "student (LoRaD, rank 4)" in body
    assert 'DiffusionPipeline.from_pretrained("name")' in body or "me/name" in body
    stock = DiffusionPipeline.from_pretrained("me/name", token=READ)
    assert type(stock) is StableDiffusionPipeline
    torch.testing.assert_close(latents(stock), expected, rtol=0.05, atol=0.1)  # weights of float16
    pipe.to(torch.float32)
    url = pipe.push_to_hub("org/other", "second", token=WRITE, card=CardDetails(prompts=["red"] * 3))
    assert url.startswith(hub.url + "/org/other/commit/") and hub.repositories["org/other"].messages[-1] == "second"
    assert Image.open(io.BytesIO(hub.repositories["org/other"].files["samples.png"])).size == (192, 64)
    assert url == f"{hub.url}/org/other/commit/{hub.repositories['org/other'].refs['main']}"


def test_the_card_of_an_adapter_of_another_pipeline(hub, components, adapter_folder, tmp_path):
    pipe = StockPipeline(**components)
    pipe.load_lorad_weights(adapter_folder)
    picture = tmp_path / "grid.png"
    Image.new("RGB", (8, 8)).save(picture)
    details = CardDetails(description="A style.", samples=picture, license="mit")
    pipe.push_lorad_to_hub("me/style", token=WRITE, base_model_name_or_path="org/base", card=details)
    data, body = card_of(hub.repositories["me/style"])
    assert data["tags"] == ["lorad", "text-to-image", "diffusers"] and "A style." in body
    assert 'pipe.load_lorad_weights("me/style")' in body and "one step" not in body
    assert hub.repositories["me/style"].files["samples.png"] == picture.read_bytes()


def test_the_stand_in_refuses_what_the_hub_refuses():
    """A push that passes against it has really spoken the protocol."""
    import urllib.error
    import urllib.request

    server = HubServer()
    try:
        for path, status in (("/api/repos/create", 401), ("/anything", 404)):
            request = urllib.request.Request(server.url + path, data=b"{}", method="POST")
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
            assert error.value.code == status
    finally:
        server.close()


def test_saving_alone_asks_nothing_of_the_hub(hub, pipe, tmp_path):
    add_random_adapter(pipe.unet)
    save_lorad_adapter(pipe.unet, tmp_path / "a", "student", base_model_name_or_path="org/base")
    pipe.save_lorad_weights(tmp_path / "b", base_model_name_or_path="org/base")
    pipe.save_pretrained(tmp_path / "c")
    assert not hub.requests and not list(tmp_path.glob("*/README.md"))
