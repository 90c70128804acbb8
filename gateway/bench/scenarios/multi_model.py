"""`multi-model`: requests to several models in several languages, one after the other and at once."""

from gateway.bench.options import BenchOptions
from gateway.bench.prompts import GREETINGS, QUESTIONS, user
from gateway.bench.results import ScenarioResult
from gateway.bench.runner import Runner
from gateway.bench.scenarios.base import Scenario, at_once, in_turn, warm_up
from gateway.bench.scenarios.text_parallel import FIGURES, IN_TURN, TOGETHER, compared
from gateway.bench.target import BenchRequest
from gateway.bench.workload import Prompts, describe

OUTPUT_LEN = 128
LANGUAGES = ("ko", "en", "ja")


async def run(options: BenchOptions, runner: Runner) -> ScenarioResult:
    """Send the requests in turn, then at once; every model is loaded before."""
    prompts = await Prompts.of(options, runner, OUTPUT_LEN)
    requests = _requests(options, prompts)
    seen: dict[str, BenchRequest] = {}
    for request in requests:
        seen.setdefault(request.model, request)
    await warm_up(options, runner, list(seen.values()))
    runs = [await in_turn(runner, IN_TURN, requests, options)]
    if not runner.stop.is_set():
        runs.append(await at_once(runner, TOGETHER, requests, options))
    workload = describe(options, requests, models=len(seen))
    return compared("multi-model", options, runs, "multi_model", prompts.notes, workload)


def _requests(options: BenchOptions, prompts: Prompts) -> list[BenchRequest]:
    """Return a request for each language; the first model gets the first, the last one all that are left."""
    models = options.models or (options.target.model,)
    languages = options.languages if len(options.languages) > 1 else LANGUAGES
    count = options.num_prompts or max(len(models), len(languages))
    requests = []
    for number in range(count):
        model = models[min(number % max(len(models), len(languages)), len(models) - 1)]
        language = languages[number % len(languages)]
        text = f"{GREETINGS[language]}! {QUESTIONS[language][number % len(QUESTIONS[language])]}"
        request = BenchRequest(
            user(text), prompts.output_len, model=model, language=language, name=f"{model} ({language})"
        )
        requests.append(prompts.completed(request))
    return requests


SCENARIO = Scenario("multi-model", run, frozenset({"num_prompts", "models"}), FIGURES)
