"""Files, environment and flags become specs; what is wrong is said with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from raylaunch.config.load import Flag, find_cluster_file, job_spec_from_flags, load_cluster_file
from raylaunch.controller.store.backlog import required_amounts
from raylaunch.errors import SpecError
from raylaunch.models.cluster_spec import ClusterSpec
from raylaunch.models.job_spec import JobSpec

Here = Callable[[str, str], Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYLAUNCH_CLUSTER_FILE", raising=False)

    def write(name: str, text: str) -> Path:
        Path(name).write_text(text)
        return Path(name)

    return write


def job_error(here: Here, text: str) -> SpecError:
    with pytest.raises(SpecError) as caught:
        job_spec_from_flags((), file=here("job.yaml", text))
    return caught.value


def flag_error(*flags: Flag) -> SpecError:
    with pytest.raises(SpecError) as caught:
        job_spec_from_flags([Flag("--", ("entrypoint",), ("python", "train.py")), *flags])
    return caught.value


def test_an_unknown_key_is_refused_with_file_line_and_nearest_key(here: Here) -> None:
    error = job_error(here, "name: a\nentrypoint: x\n\nresorces:\n  gpus: 1\n")
    assert str(error) == "job.yaml:4: unknown key 'resorces' (nearest: resources)"
    assert (error.where, error.field) == ("job.yaml:4", "resorces")


def test_an_unknown_nested_key_is_refused_with_its_place(here: Here) -> None:
    error = job_error(here, "entrypoint: x\nresources:\n  gpu: 1\n")
    assert str(error) == "job.yaml:3: unknown key 'gpu' in resources (nearest: gpus)"


def test_a_key_that_belongs_one_level_deeper_is_pointed_there(here: Here) -> None:
    assert str(job_error(here, "entrypoint: x\ngpus: 1\n")) == (
        "job.yaml:2: unknown key 'gpus' (nearest: resources.gpus)"
    )


def test_a_key_similar_to_no_other_is_refused_with_all_keys(here: Here) -> None:
    error = job_error(here, "entrypoint: x\ntracking:\n  zzzz: 1\n")
    assert str(error) == ("job.yaml:3: unknown key 'zzzz' in tracking (known: mode, project, entity, group, job_type)")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("resources: {gpus: two}", "job.yaml:2: resources.gpus: 'two' is not a whole number"),
        ("resources: {gpus: -1}", "job.yaml:2: resources.gpus: -1 is less than 0"),
        ("priority: 200", "job.yaml:2: priority: 200 is more than 100"),
        ("where: 5", "job.yaml:2: where: 5 is not a mapping of keys to values"),
        ("launcher: mpirun", "job.yaml:2: launcher: 'mpirun' is not one of script, torchrun, ray"),
        (
            "processes: 2",
            (
                "job.yaml:2: processes: only launcher: torchrun starts ranks, and the launcher is script; "
                "write launcher: torchrun"
            ),
        ),
        ("tags: [a, 1]", "job.yaml:2: tags.1: 1 is not text; write it in quotes"),
        ("tracking: {mode: on}", "job.yaml:2: tracking.mode: true is not one of auto, online, offline, disabled"),
        (
            "timeout_s: soon",
            "job.yaml:2: timeout_s: 'soon' is not a duration; write seconds, or 90s, 15m, 2h, 1h30m, 2d",
        ),
        (
            "resources: {memory: 8 apples}",
            "job.yaml:2: resources.memory: '8 apples' is not a size; write bytes, or 512MiB, 8GiB, 16G",
        ),
        (
            "env:\n  A: 1\n  CUDA_VISIBLE_DEVICES: 0",
            (
                "job.yaml:4: env: CUDA_VISIBLE_DEVICES cannot be set: "
                "raylaunch gives each job its GPUs; ask for them with resources.gpus"
            ),
        ),
    ],
)
def test_a_wrong_value_is_reported_with_its_place(here: Here, text: str, sentence: str) -> None:
    assert str(job_error(here, f"entrypoint: x\n{text}\n")) == sentence


def test_all_errors_are_reported_together(here: Here) -> None:
    error = job_error(here, "entrypoint: 5\nretries: -1\nnmae: x\n")
    assert str(error).splitlines() == [
        "job.yaml:1: entrypoint: 5 is not text or a list",
        "job.yaml:2: retries: -1 is less than 0",
        "job.yaml:3: unknown key 'nmae' (nearest: name)",
    ]


def test_the_inside_of_a_value_that_may_be_secret_is_not_repeated(here: Here) -> None:
    assert "hunter2" not in str(job_error(here, "entrypoint: x\nenv:\n  PASSWORD: [hunter2]\n"))


def test_a_missing_entrypoint_is_named(here: Here) -> None:
    assert str(job_error(here, "name: a\n")) == "job.yaml: the key 'entrypoint' is missing"


def test_a_key_given_twice_is_refused(here: Here) -> None:
    error = job_error(here, "entrypoint: x\nenv:\n  A: 1\n  A: 2\n")
    assert str(error) == "job.yaml:4: the key 'env.A' is given twice (first on line 3)\n  → keep one of the two"


def test_a_file_that_is_not_yaml_is_refused_with_its_line(here: Here) -> None:
    error = job_error(here, "name: a\nentrypoint: [\n")
    assert str(error).startswith("job.yaml:3: this is not YAML: expected the node content")


def test_a_file_with_a_tag_that_creates_objects_is_refused(here: Here) -> None:
    error = job_error(here, "entrypoint: !!python/object/apply:os.system [echo]\n")
    assert str(error).startswith("job.yaml:1: this is not YAML: could not determine a constructor for the tag")


SECRET_FILES = {
    "netrc": "machine h login u password hunter2\n",
    "key": "-----BEGIN KEY-----\nhunter2\n",
    "ini": "[default]\naws_secret = hunter2\n",
    "tag": "a: !hunter2 b\n",
    "alias": "a: *hunter2\n",
    "anchor": "a: &hunter2 b\nc: &hunter2 d\n",
    "indicator": "a: @hunter2\n",
    "quote": "a: 'hunter2\n",
    "directive": "%hunter2 x\n",
    "env": "entrypoint: x\nenv: hunter2\n",
    "env value": "entrypoint: x\nenv: {A: 2026-01-01}\n",
    "secret": "entrypoint: x\nsecrets: [A=hunter2]\n",
}


@pytest.mark.parametrize("name", SECRET_FILES)
def test_an_error_quotes_neither_a_file_of_another_kind_nor_a_secret(here: Here, name: str) -> None:
    error = str(job_error(here, SECRET_FILES[name]))
    assert "hunter2" not in error
    assert "2026" not in error
    assert "job.yaml" in error


def test_a_list_instead_of_keys_is_refused(here: Here) -> None:
    assert str(job_error(here, "- a\n")) == (
        "job.yaml:1: the file contains a list, not keys with values\n  → write it as: key: value"
    )


def test_a_missing_file_is_reported_with_the_searched_folder(here: Here, tmp_path: Path) -> None:
    here("other.yaml", "")
    with pytest.raises(SpecError) as caught:
        job_spec_from_flags((), file=Path("nope.yaml"))
    assert str(caught.value) == f"nope.yaml: there is no such file\n  → looked in {tmp_path}"


def test_a_file_that_is_not_text_is_refused(here: Here) -> None:
    here("job.yaml", "")
    Path("job.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(SpecError) as caught:
        job_spec_from_flags((), file=Path("job.yaml"))
    assert caught.value.message == "job.yaml: the file is not UTF-8 text (byte 6)"


def test_numbers_and_booleans_in_env_are_text(here: Here) -> None:
    spec = job_spec_from_flags((), file=here("job.yaml", "entrypoint: x\nenv: {A: 1, B: true, C: 0.5}\n"))
    assert spec.env == {"A": "1", "B": "true", "C": "0.5"}


def test_the_working_directory_of_a_file_is_relative_to_the_file(here: Here, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    spec = job_spec_from_flags((), file=here("deep/job.yaml", "entrypoint: x\nworking_dir: code\n"))
    assert spec.working_dir == str(tmp_path / "deep" / "code")
    assert job_spec_from_flags((), file=here("deep/job.yaml", "entrypoint: x\n")).working_dir == str(tmp_path / "deep")
    assert job_spec_from_flags((), file=here("deep/job.yaml", "entrypoint: x\nworking_dir: ''\n")).working_dir == ""


def test_a_flag_overrides_the_file_and_adds_to_lists_and_env(here: Here) -> None:
    file = here("job.yaml", "entrypoint: x\ntags: [a]\nenv: {A: 1, B: 1}\nresources: {gpus: 1, cpus: 3}\n")
    flags = [
        Flag("--gpus", ("resources", "gpus"), 2),
        Flag("--tag", ("tags",), ("b",)),
        Flag("--env", ("env",), {"B": "2"}),
        Flag("--", ("entrypoint",), ("python", "train.py")),
    ]
    spec = job_spec_from_flags(flags, file=file)
    assert (spec.resources.gpus, spec.resources.cpus, spec.tags) == (2, 3, ("a", "b"))
    assert spec.env == {"A": "1", "B": "2"}
    assert spec.entrypoint == ("python", "train.py")


def test_a_wrong_flag_is_named_by_its_option() -> None:
    assert str(flag_error(Flag("--gpus", ("resources", "gpus"), "two"))) == "--gpus: 'two' is not a whole number"
    assert str(flag_error(Flag("--timeout", ("timeout_s",), "soon"))).startswith("--timeout: 'soon' is not a duration")


def test_a_gpu_variable_is_refused_as_a_flag_too() -> None:
    assert str(flag_error(Flag("--env", ("env",), {"CUDA_VISIBLE_DEVICES": "0"}))) == (
        "--env: CUDA_VISIBLE_DEVICES cannot be set: raylaunch gives each job its GPUs; ask for them with resources.gpus"
    )


def test_a_missing_program_is_refused_with_an_example() -> None:
    with pytest.raises(SpecError) as caught:
        job_spec_from_flags([])
    assert str(caught.value) == (
        "there is nothing to run: no entrypoint was given\n"
        "  → write the command after --: raylaunch run -- python train.py; or name a file: -f job.yaml"
    )


def test_without_a_cluster_file_the_cluster_is_the_embedded_one(here: Here) -> None:
    here("job.yaml", "")
    assert load_cluster_file().spec == ClusterSpec()


def test_the_environment_variable_takes_precedence_over_the_cluster_file_here(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    here("cluster.yaml", "name: here\n")
    named = here("other.yaml", "name: other\ngpus: [0, 1]\n")
    assert load_cluster_file().spec.name == "here"
    monkeypatch.setenv("RAYLAUNCH_CLUSTER_FILE", str(named))
    spec = load_cluster_file().spec
    assert (spec.name, spec.gpus) == ("other", ("0", "1"))


def test_a_kind_that_there_is_not_is_refused_with_those_there_are(here: Here) -> None:
    with pytest.raises(SpecError) as caught:
        load_cluster_file(here("cluster.yaml", "name: dgx\nkind: k8s\nhosts: [a]\n"))
    assert caught.value.field == "kind"
    assert "cluster.yaml:2: kind: 'k8s' is not one of local, ssh, existing" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kind: existing\nname: a\n", "kind: existing needs address"),
        ("name: a\naddress: ray:8265\n", "'ray:8265' is not the address of a Ray dashboard"),
        ("name: a\naddress: http://ray:8265\ngcs: ray\n", "'ray' is not the address of a Ray head"),
        ("name: a\naddress: http://ray:8265\ngpus: 4\n", "gpus was set when that Ray was started"),
        ("name: a\naddress: http://ray:8265\nhosts: [b]\n", "address is for a Ray that somebody else runs"),
        ("address: http://ray:8265\n", "the name 'local' is reserved"),
        ("kind: local\ngcs: ray:1\n", "gcs is for a Ray that somebody else runs"),
    ],
)
def test_options_that_an_existing_ray_does_not_have_are_refused(here: Here, text: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_cluster_file(here("cluster.yaml", text))
    assert expected in str(caught.value)


def test_an_address_alone_means_an_existing_ray(here: Here) -> None:
    spec = load_cluster_file(here("cluster.yaml", "name: theirs\naddress: http://ray.example.org:8265/\n")).spec
    assert (spec.kind, spec.address, spec.gcs_address) == (
        "existing",
        "http://ray.example.org:8265",
        "ray.example.org:6379",
    )


def test_a_wrong_value_in_a_cluster_file_is_reported_with_all_valid_ones(here: Here) -> None:
    with pytest.raises(SpecError) as caught:
        load_cluster_file(here("cluster.yaml", "gpus: some\n"))
    assert str(caught.value) == "cluster.yaml:1: gpus: 'some' is not 'auto', a whole number or a list"


@pytest.mark.parametrize("name", ["GPU", "CPU", "memory", "gpu", "node:10.0.0.1", "accelerator_type:H100"])
def test_a_custom_resource_cannot_replace_a_built_in_one(name: str) -> None:
    with pytest.raises(ValidationError, match="resource"):
        JobSpec.model_validate({"entrypoint": "x", "resources": {"gpus": 1, "custom": {name: 0}}})
    one = JobSpec.model_validate({"entrypoint": "x", "resources": {"gpus": 1, "custom": {"scratch": 1}}})
    assert required_amounts(one) == {"GPU": 1, "scratch": 1}


def test_a_chosen_file_that_cannot_be_read_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYLAUNCH_CLUSTER_FILE", raising=False)
    monkeypatch.setenv("RAYLAUNCH_HOME", str(tmp_path / ("x" * 300)))  # a name that is too long
    with pytest.raises(SpecError, match="the file of the chosen cluster cannot be read: File name too long"):
        find_cluster_file()


@pytest.mark.parametrize("gpus", [0.5, "0.5"])
def test_a_fraction_of_a_gpu_is_refused_with_an_alternative(gpus: object) -> None:
    with pytest.raises(SpecError, match="a job gets whole GPUs; to share one, run the programs in one job"):
        job_spec_from_flags([Flag("--gpus", ("resources", "gpus"), gpus), Flag("--", ("entrypoint",), ("python",))])


@pytest.mark.parametrize(("key", "old"), [("timeout", "timeout_s"), ("grace", "grace_s")])
def test_a_duration_key_has_no_unit_and_the_old_key_is_accepted(here: Here, key: str, old: str) -> None:
    for name in (key, old):
        found = job_spec_from_flags((), file=Path(here("job.yaml", f"entrypoint: python train.py\n{name}: 6h\n")))
        assert getattr(found, old) == 6 * 3600
    with pytest.raises(SpecError, match=f"{key} and {old} are the same setting"):
        job_spec_from_flags((), file=Path(here("job.yaml", f"entrypoint: x\n{key}: 1h\n{old}: 2h\n")))
    with pytest.raises(SpecError, match=f"job.yaml:2: {key}: 'soon' is not a duration"):
        job_spec_from_flags((), file=Path(here("job.yaml", f"entrypoint: x\n{key}: soon\n")))
    file = Path(here("job.yaml", f"entrypoint: x\n{key}: 1h\n"))
    assert getattr(job_spec_from_flags([Flag(f"--{key}", (old,), "2h")], file=file), old) == 2 * 3600


@pytest.mark.parametrize(("key", "old"), [("jobs", "jobs_s"), ("checkpoints", "checkpoints_s")])
def test_a_retention_key_has_no_unit_and_the_old_key_is_accepted(here: Here, key: str, old: str) -> None:
    for name in (key, old):
        found = load_cluster_file(Path(here("cluster.yaml", f"retention:\n  {name}: 2d\n"))).spec
        assert getattr(found.retention, old) == 2 * 86400
    with pytest.raises(SpecError, match=f"{key} and {old} are the same setting"):
        load_cluster_file(Path(here("cluster.yaml", f"retention: {{{key}: 1d, {old}: 2d}}\n")))
    with pytest.raises(SpecError, match=f"cluster.yaml:2: retention.{key}: 'soon' is not a duration"):
        load_cluster_file(Path(here("cluster.yaml", f"retention:\n  {key}: soon\n")))
    with pytest.raises(SpecError, match=f"nearest: retention.{key}"):
        load_cluster_file(Path(here("cluster.yaml", f"{key}: 2d\n")))
