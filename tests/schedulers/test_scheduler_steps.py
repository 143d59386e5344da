"""What every solver must do, whatever its numbers: reach the clean sample, stay finite, refuse nonsense."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.schedulers.trajectories import ALWAYS_DRAWS, COGVIDEOX_5B, SD15, SHAPE, seeded, start, toy_model, trajectory

from lowtide.schedulers import SCHEDULERS, SHORT_NAMES, Scheduler, draw_noise
from lowtide.schedulers.ddim import DDIMConfig, DDIMScheduler
from lowtide.schedulers.noise_schedule import rescale_to_zero_snr, training_betas
from lowtide.schedulers.unipc import UniPCMultistepConfig, UniPCMultistepScheduler

DDIM, PNDM, UNIPC, EULER, DPM, COG_DDIM, COG_DPM = SCHEDULERS
FIXED_GAP = (DDIM, PNDM, COG_DDIM, COG_DPM)  # their steps meet the next timestep only if it is "leading"
SPACINGS = ("leading", "trailing", "linspace")
BASE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def build(name: str, **entries) -> Scheduler:
    return SCHEDULERS[name].from_config({**BASE, "skip_prk_steps": True, **entries})


def perfect_model(scheduler, clean, kind):
    """A model that knows the clean sample, and predicts what is asked of it from any sample on the way."""

    def model(model_input, timestep):
        bar = torch.from_numpy(_alpha_bar(scheduler, float(timestep)))
        alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        noise = (model_input.double() - alpha * clean) / sigma
        predicted = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean}[kind]
        return predicted.to(model_input.dtype)

    return model


def _alpha_bar(scheduler, timestep):
    """ᾱ of the noise level at which the scheduler stands, which for fractions is interpolated in σ."""
    bars = scheduler.alphas_cumprod.double().numpy()
    sigma = np.interp(timestep, np.arange(len(bars)), ((1 - bars) / bars) ** 0.5)
    return np.asarray(1 / (sigma**2 + 1))


@given(
    name=st.sampled_from(list(SCHEDULERS)),
    num_steps=st.integers(1, 50),
    spacing=st.sampled_from(SPACINGS),
    kind=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    seed=st.integers(0, 100),
)
@settings(max_examples=80, deadline=None)
def test_a_perfect_model_leads_to_the_clean_sample(name, num_steps, spacing, kind, seed):
    if name in FIXED_GAP:
        spacing = "leading"
    if name == PNDM:  # it combines predictions as they come, which is exact for constant ones, and v is not
        kind = "epsilon"
    scheduler = build(name, timestep_spacing=spacing, prediction_type=kind, set_alpha_to_one=True)
    clean = start(seed).double()
    scheduler.set_timesteps(num_steps)
    first = scheduler.timesteps[:1]
    noisy = scheduler.add_noise(clean.float(), start(seed + 1), first) / scheduler.init_noise_sigma
    end = trajectory(scheduler, num_steps, noisy, model=perfect_model(scheduler, clean, kind))[-1]
    assert (end - clean).abs().max() < 2e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_imperfect_model_does_not(name):
    """Negative control: with noise predicted one part in a hundred too small the clean sample is missed."""
    scheduler, clean = build(name, set_alpha_to_one=True, timestep_spacing="leading"), start(1).double()
    perfect = perfect_model(scheduler, clean, "epsilon")
    end = trajectory(scheduler, 20, start(2), model=lambda x, t: 0.99 * perfect(x, t))[-1]
    assert (end - clean).abs().max() > 2e-4


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_number_of_steps_gives_finite_samples(name):
    scheduler = build(name)
    for num_steps in range(1, 51):
        samples = trajectory(scheduler, num_steps, start(num_steps, shape=(1, 1, 2, 2)))
        assert samples[-1].isfinite().all(), num_steps
        assert len(samples) - 1 == (num_steps + 1 if name == PNDM and num_steps > 1 else num_steps)


@pytest.mark.parametrize(
    "options", [{"solver_type": "bh1"}, {"lower_order_final": False}, {"solver_order": 3}], ids=str
)
def test_unipc_ends_at_sigma_zero_without_nan(options):
    """Where the last step is infinite in log α/σ; the peer gives NaN for the first two."""
    for num_steps in (1, 2, 5, 20):
        assert trajectory(build(UNIPC, **options), num_steps, start())[-1].isfinite().all()


@pytest.mark.parametrize("name", [UNIPC, DPM, EULER])
@pytest.mark.parametrize("last", ["zero", "sigma_min"])
def test_karras_sigmas_with_repeated_timesteps(name, last):
    """A cosine schedule rounds many Karras sigmas to one timestep; the peer then skips one and overruns the end."""
    options = {"use_karras_sigmas": True, "final_sigmas_type": last, "solver_order": 3}
    scheduler = build(name, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", **options)
    samples = trajectory(scheduler, 50, start())
    assert len(samples) == 51
    assert samples[-1].isfinite().all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trailing_timesteps_are_as_many_as_asked(name):
    """61 steps of 1000: rounding gives the peer a 62nd timestep, -1."""
    scheduler = build(name, timestep_spacing="trailing")
    scheduler.set_timesteps(61)
    assert len(scheduler.timesteps.unique()) == 61
    assert scheduler.timesteps.min() >= 0


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_numbers_of_steps_can_be_laid_out_or_are_refused(name, spacing):
    scheduler = build(name, timestep_spacing=spacing, num_train_timesteps=100)
    for num_steps in range(1, 100):
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps.min() >= 0
        assert scheduler.timesteps.max() < 100
        assert (scheduler.timesteps.diff() <= 0).all()


def test_stable_diffusion_takes_51_calls_for_50_steps():
    scheduler = SCHEDULERS[PNDM].from_config(SD15)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist()[:4] == [981, 961, 961, 941]
    assert scheduler.timesteps.tolist()[-2:] == [21, 1]
    assert len(scheduler.timesteps) == 51


def test_runge_kutta_takes_nine_more_calls():
    scheduler = build(PNDM, skip_prk_steps=False)
    samples = trajectory(scheduler, 50, start())
    assert len(samples) - 1 == 59
    with pytest.raises(ValueError, match="from 4 to 1000"):
        scheduler.set_timesteps(3)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("num_steps", [0, -3, 1001])
def test_a_wrong_number_of_steps_is_refused_with_the_range(name, num_steps):
    with pytest.raises(ValueError, match=f"num_inference_steps={num_steps} .* from 1 to 1000"):
        build(name).set_timesteps(num_steps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_timesteps_beyond_the_training_schedule_are_refused(name):
    with pytest.raises(ValueError, match=r"999 .*fewer steps"):
        build(name, timestep_spacing="leading", steps_offset=2).set_timesteps(999)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_step_needs_set_timesteps(name):
    with pytest.raises(ValueError, match="set_timesteps"):
        build(name).step(start(), 999, start())


@pytest.mark.parametrize("name", [UNIPC, EULER, DPM])
def test_steps_after_the_last_and_unknown_timesteps_are_refused(name):
    scheduler = build(name)
    trajectory(scheduler, 3, start())
    with pytest.raises(ValueError, match="All 3 steps are done"):
        scheduler.step(start(), scheduler.timesteps[-1], start())
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="Timestep 5 is none"):
        scheduler.step(start(), 5, start())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_second_run_equals_the_first(name):
    scheduler = build(name)
    first = trajectory(scheduler, 7, start(), **seeded(name))
    scheduler.set_timesteps(5)  # a run broken off after two steps must leave no trace
    for t in scheduler.timesteps[:2]:
        scheduler.step(toy_model(scheduler.scale_model_input(start(), t), t), t, start())
    assert torch.equal(trajectory(scheduler, 7, start(), **seeded(name))[-1], first[-1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_sample_is_kept_after_the_last_step(name):
    scheduler = build(name)
    before = held_tensors(scheduler)
    trajectory(scheduler, 7, start())
    assert held_tensors(scheduler) == before


def held_tensors(scheduler):
    tensors = []
    stack = list(vars(scheduler).values())
    while stack:
        value = stack.pop()
        if isinstance(value, (list, tuple)):
            stack.extend(value)
        elif isinstance(value, torch.Tensor) and value.shape == SHAPE:
            tensors.append(value)
    return len(tensors)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_eta_and_generator_are_accepted_by_all(name):
    end = trajectory(build(name), 3, start(), eta=0.0, generator=torch.Generator().manual_seed(0))[-1]
    assert torch.equal(end, trajectory(build(name), 3, start(), **seeded(name))[-1])
    other = trajectory(build(name), 3, start(), eta=0.0, generator=torch.Generator().manual_seed(1))
    assert torch.equal(other[1], trajectory(build(name), 3, start(), **seeded(name))[1]) == (name not in ALWAYS_DRAWS)


def test_eta_out_of_range_is_refused():
    scheduler = build(DDIM)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=r"eta=1\.5 .* from 0"):
        scheduler.step(start(), 0, start(), eta=1.5)


@pytest.mark.parametrize("name", [DDIM, COG_DDIM, COG_DPM])
def test_epsilon_at_zero_snr_is_refused(name):
    scheduler = build(name, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="prediction_type='v_prediction' or timestep_spacing='leading'"):
        trajectory(scheduler, 4, start())
    assert trajectory(build(name, rescale_betas_zero_snr=True), 4, start())[-1].isfinite().all()


@pytest.mark.parametrize("name", [COG_DDIM, COG_DPM])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_cogvideox_begins_in_pure_noise_and_stays_finite(name, shift):
    scheduler = SCHEDULERS[name].from_config({**COGVIDEOX_5B, "snr_shift_scale": shift})
    assert scheduler.alphas_cumprod[-1] == 0
    for num_steps in range(1, 51):
        samples = trajectory(scheduler, num_steps, start(shape=(1, 2, 3, 2, 2)), **seeded(name))
        assert scheduler.timesteps[0] == 999
        assert all(sample.isfinite().all() for sample in samples), num_steps


@pytest.mark.parametrize("name", [COG_DDIM, COG_DPM])
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_cogvideox_from_pure_noise_to_the_clean_sample(name, kind):
    """At ᾱ = 0 the first sample says nothing of the clean one, and the model's prediction all."""
    scheduler, clean = SCHEDULERS[name].from_config({**COGVIDEOX_5B, "prediction_type": kind}), start(1).double()

    def model(sample, t):
        bar = scheduler.alphas_cumprod[int(t)]
        noise = (sample.double() - bar.sqrt() * clean) / (1 - bar).sqrt()
        return (clean if kind == "sample" else bar.sqrt() * noise - (1 - bar).sqrt() * clean).float()

    for num_steps in (1, 5, 50):
        assert (trajectory(scheduler, num_steps, start(2), model=model)[-1] - clean).abs().max() < 2e-4
        wrong = trajectory(scheduler, num_steps, start(2), model=lambda x, t: 0.99 * model(x, t))
        assert (wrong[-1] - clean).abs().max() > 2e-4  # negative control


def test_cogvideox_dpm_steps_out_of_order_are_refused():
    scheduler = SCHEDULERS[COG_DPM].from_config(COGVIDEOX_5B)
    scheduler.set_timesteps(5)
    scheduler.step(start(), 799, start())
    for wrong in (799, 399, 199):
        with pytest.raises(ValueError, match=rf"Timestep {wrong} does not follow 799: .*set_timesteps"):
            scheduler.step(start(), wrong, start())
    scheduler.step(start(), 599, start())  # a step refused leaves no trace


@pytest.mark.parametrize("name", [COG_DDIM, COG_DPM])
@pytest.mark.parametrize("timestep", [-1, 1000, -201])
def test_cogvideox_timesteps_beyond_the_training_schedule_are_refused(name, timestep):
    scheduler = SCHEDULERS[name].from_config(COGVIDEOX_5B)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=rf"Timestep {timestep} is not possible: .*0…999.*{name}\.timesteps"):
        scheduler.step(start(), timestep, start())


def test_cogvideox_dpm_refuses_timesteps_of_another_run_and_samples_of_another_clip():
    scheduler = SCHEDULERS[COG_DPM].from_config(COGVIDEOX_5B)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=r"Timestep 800 is none of the 5 .*call set_timesteps"):
        scheduler.step(start(), 800, start())
    scheduler.step(start(), 599, start())
    small = start(shape=(1, 3, 4, 5))
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4, 5\), .*\(2, 3, 4, 5\): .*Call set_timesteps"):
        scheduler.step(small, 399, small)
    scheduler.set_timesteps(5)
    scheduler.step(small, 399, small)


def test_cogvideox_dpm_begins_anew_at_the_first_timestep():
    """After a run broken off, and after one that ended, without `set_timesteps`; also for a clip of another shape."""

    def run(scheduler, sample):
        options = seeded(COG_DPM)
        for t in scheduler.timesteps:
            sample = scheduler.step(toy_model(sample, t), t, sample, **options).prev_sample
        return sample

    fresh, scheduler = (SCHEDULERS[COG_DPM].from_config(COGVIDEOX_5B) for _ in range(2))
    for one in (fresh, scheduler):
        one.set_timesteps(5)
    expected = run(fresh, start())
    for t in scheduler.timesteps[:2]:
        scheduler.step(start(shape=(1, 2)), t, start(shape=(1, 2)))
    for _ in range(2):
        assert torch.equal(run(scheduler, start()), expected)


def test_cogvideox_dpm_follows_timesteps_that_were_assigned():
    scheduler = SCHEDULERS[COG_DPM].from_config(COGVIDEOX_5B)
    scheduler.set_timesteps(5)
    scheduler.step(start(), 999, start())  # forgotten with the timesteps that it belongs to
    scheduler.timesteps = torch.tensor([900, 500, 100])
    for t in scheduler.timesteps:
        scheduler.step(start(), t, start())
    with pytest.raises(ValueError, match="Timestep 799 is none of the 3"):
        scheduler.step(start(), 799, start())


def test_cogvideox_dpm_forgets_where_a_run_began_late():
    """A video made from another leaves out the first timesteps; the last one ends it all the same."""
    scheduler = SCHEDULERS[COG_DPM].from_config(COGVIDEOX_5B)
    scheduler.set_timesteps(5)
    before = held_tensors(scheduler)
    for t in scheduler.timesteps[2:]:
        scheduler.step(start(), t, start())
    assert held_tensors(scheduler) == before


@pytest.mark.parametrize("name", [COG_DDIM, COG_DPM])
def test_the_shift_divides_the_signal_to_noise_ratio(name):
    plain, shifted = (build(name, snr_shift_scale=scale).alphas_cumprod for scale in (1.0, 3.0))
    assert torch.allclose(plain / (1 - plain) / 3, shifted / (1 - shifted))


def test_rescaled_schedule_ends_in_pure_noise():
    betas = training_betas("scaled_linear", 0.00085, 0.012, 1000)
    rescaled = torch.cumprod(1 - rescale_to_zero_snr(betas), 0)
    assert rescaled[-1] == 0
    assert torch.allclose(rescaled[0], 1 - betas[0])
    assert torch.cumprod(1 - betas, 0)[-1] > 1e-3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_add_noise_takes_one_timestep_for_all_or_one_each(name):
    scheduler = build(name)
    clean, noise = start(1), start(2)
    t = scheduler.timesteps[[10, 10]]
    assert torch.equal(scheduler.add_noise(clean, noise, t), scheduler.add_noise(clean, noise, t[:1]))
    assert scheduler.add_noise(clean.bfloat16(), noise.bfloat16(), t).dtype == torch.bfloat16
    later = scheduler.add_noise(clean, noise, scheduler.timesteps[[10, 500]])
    assert torch.equal(later[0], scheduler.add_noise(clean, noise, t)[0])
    assert not torch.equal(later[1], scheduler.add_noise(clean, noise, t)[1])


def test_velocity_and_noisy_sample_give_back_clean_sample_and_noise():
    """v = α ε - σ x₀ and x = α x₀ + σ ε: so α x - σ v = x₀ and σ x + α v = ε."""
    scheduler = DDIMScheduler(DDIMConfig())
    clean, noise, t = start(1), start(2), torch.tensor([300, 700])
    noisy, velocity = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
    alpha = scheduler.alphas_cumprod[t].sqrt().reshape(2, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    assert torch.allclose(alpha * noisy - sigma * velocity, clean, atol=1e-6)
    assert torch.allclose(sigma * noisy + alpha * velocity, noise, atol=1e-6)
    assert not torch.allclose(alpha * noisy - sigma * velocity, noise, atol=1e-2)


def test_noise_of_generators():
    def seeded(i):
        return torch.Generator().manual_seed(i)

    options = {"device": "cpu", "dtype": torch.float32}
    both = draw_noise(SHAPE, generator=[seeded(1), seeded(2)], **options)
    assert torch.equal(both[1:], draw_noise((1, *SHAPE[1:]), generator=seeded(2), **options))
    assert not torch.equal(both[0], both[1])
    with pytest.raises(ValueError, match="3 generators were given for a batch of 2"):
        draw_noise(SHAPE, generator=[seeded(i) for i in range(3)], **options)


def test_noise_prediction_cannot_end_at_sigma_zero():
    with pytest.raises(ValueError, match="final_sigmas_type='sigma_min'"):
        UniPCMultistepScheduler(UniPCMultistepConfig(predict_x0=False))


def test_short_names():
    assert {SCHEDULERS[full].__name__ for full in SHORT_NAMES.values()} == set(SCHEDULERS)
    assert list(SHORT_NAMES) == ["ddim", "pndm", "unipc", "euler", "dpm", "cogvideox-ddim", "cogvideox-dpm"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_on_an_accelerator_equal_those_on_the_cpu(name, device):
    scheduler = build(name)
    expected = trajectory(scheduler, 7, start(), **seeded(name))[-1]
    scheduler.set_timesteps(7, device=device)
    sample, options = start().to(device) * scheduler.init_noise_sigma, seeded(name)
    for t in scheduler.timesteps:
        output = toy_model(scheduler.scale_model_input(sample, t), t)
        sample = scheduler.step(output, t, sample, **options).prev_sample
    assert sample.device == device
    assert (sample.cpu() - expected).abs().max() < 1e-5
