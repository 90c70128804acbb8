"""Texts and numbers of the HTML report, in English and Korean; those of scenarios are in `gateway.bench.texts`."""

from typing import Literal

from gateway.bench import texts
from gateway.bench.compare_texts import COMPARE_TEXTS
from gateway.bench.results import CellValue

Lang = Literal["en", "ko"]

_TEXTS: dict[str, tuple[str, str]] = {
    "measured": ("measured", "측정"),
    "computed": ("computed", "계산"),
    "forecast": ("forecast", "예상"),
    "none": ("–", "–"),
    "not_seen": ("not seen", "측정 안 됨"),
    "report_made": ("Made by gateway {version} on {date}", "gateway {version}, {date} 작성"),
    "report_title": ("{scenario}: {model}", "{scenario}: {model}"),
    # Tiles
    "tile_requests": ("Complete answers", "완료 응답"),
    "tile_requests_detail": ("of {all} requests, {failed} failed", "요청 {all}개 중 실패 {failed}개"),
    "tile_duration": ("Duration", "소요 시간"),
    "tile_duration_detail": ("run “{run}”, {rate} req/s", "실행 “{run}”, 초당 {rate}건"),
    "tile_throughput": ("Output tokens per second", "초당 출력 토큰"),
    "tile_throughput_detail": ("in sum; {user} for each user", "전체 합계, 사용자당 {user}"),
    "tile_ttft": ("Time to first token", "첫 토큰까지 시간"),
    "tile_latency": ("Latency of the answer", "응답 지연"),
    "tile_percentiles": ("median; p95 {p95}", "중앙값, p95 {p95}"),
    "tile_most": ("median; longest of {n}: {most}", "중앙값, {n}개 중 최대 {most}"),
    # Sections
    "section_results": ("Results", "결과"),
    "section_pictures": ("Pictures", "그래프"),
    "section_metrics": ("Latency and throughput", "지연 시간과 처리량"),
    "section_metrics_intro": (
        "Definitions are those of vllm bench serve. A percentile is shown only if there are enough requests for it.",
        "정의는 vllm bench serve와 같습니다. 백분위수는 표본이 충분할 때만 표시합니다.",
    ),
    "section_method": ("Method, machine and versions", "측정 방법, 장비, 버전"),
    "summary_terminal": (
        "Summary of the main run, as vllm bench serve prints it",
        "주 실행 요약 (vllm bench serve 형식)",
    ),
    # Pictures
    "chart_over_time": ("Latency over time", "시간에 따른 지연"),
    "chart_over_time_hint": (
        "Each point is a request, at the second in which it was sent.",
        "점 하나가 요청 하나이며, 보낸 시각에 표시합니다.",
    ),
    "chart_thinned": ("Shown are {shown} of {all} requests.", "전체 {all}개 중 {shown}개를 표시합니다."),
    "chart_distribution": ("Distribution of latency", "지연 시간 분포"),
    "chart_distribution_hint": (
        "Share of the requests that were answered within a time. Further left is faster; steeper is steadier.",
        "해당 시간 안에 응답한 요청의 비율입니다. 왼쪽일수록 빠르고, 가파를수록 고릅니다.",
    ),
    "chart_ttft_distribution": ("Distribution of the time to the first token", "첫 토큰까지 시간의 분포"),
    "chart_throughput": ("Output over time", "시간에 따른 출력량"),
    "chart_throughput_hint": (
        "Pieces of answers that arrived in each second; most servers put one token into a piece.",
        "초마다 도착한 응답 조각 수입니다. 대부분의 서버는 조각 하나에 토큰 하나를 담습니다.",
    ),
    "chart_timeline": ("Requests over time: {run}", "요청별 진행: {run}"),
    "chart_timeline_hint": (
        "Bars that lie side by side were served together; stairs were served one after the other.",
        "막대가 나란하면 함께 처리된 것이고, 계단 모양이면 하나씩 처리된 것입니다.",
    ),
    "timeline_waited": ("waited in the client", "클라이언트에서 대기"),
    "timeline_first": ("until the first token", "첫 토큰까지"),
    "timeline_rest": ("answer", "응답 생성"),
    "timeline_failed": ("failed", "실패"),
    "timeline_more": ("The first {shown} of {all} requests.", "전체 {all}개 중 처음 {shown}개."),
    "chart_bars_hint": ("Longer is more.", "막대가 길수록 값이 큽니다."),
    "chart_bars_better_high": ("A longer bar is better.", "막대가 길수록 좋습니다."),
    "chart_bars_better_low": ("A shorter bar is better.", "막대가 짧을수록 좋습니다."),
    "axis_sent": ("sent after (s)", "보낸 시각 (초)"),
    "axis_seconds": ("latency (s)", "지연 (초)"),
    "axis_ttft": ("time to first token (s)", "첫 토큰까지 (초)"),
    "axis_share": ("requests (%)", "요청 (%)"),
    "axis_elapsed": ("elapsed (s)", "경과 (초)"),
    "axis_pieces": ("pieces/s", "조각/초"),
    "series_latency": ("latency", "지연"),
    "series_ttft": ("first token", "첫 토큰"),
    "run": ("run", "실행"),
    # Facts
    "fact_url": ("Address", "주소"),
    "fact_endpoint": ("Endpoint", "엔드포인트"),
    "fact_model": ("Model", "모델"),
    "fact_api": ("API", "API"),
    "fact_date": ("Date", "일시"),
    "fact_client_load": ("Load client", "부하 클라이언트"),
    "fact_workload": ("Workload", "작업 부하"),
    "fact_server": ("Server", "서버"),
    "fact_cpu": ("Processor", "프로세서"),
    "fact_cores": ("Cores", "코어 수"),
    "fact_memory_gib": ("Memory (GiB)", "메모리 (GiB)"),
    "fact_system": ("System", "운영체제"),
    "fact_python": ("Python", "Python"),
    "fact_gateway": ("gateway", "gateway"),
    "fact_gpu": ("GPU", "GPU"),
    "fact_driver": ("GPU driver", "GPU 드라이버"),
    "facts_measurement": ("Measurement", "측정"),
    "facts_machine": ("Machine that sent the requests", "요청을 보낸 장비"),
    "method_clock": (
        "Times are taken in the client with a monotonic clock: from sending a request to the first and to the last "
        "piece of its answer. They include the network.",
        "시간은 클라이언트의 단조 시계로 쟀습니다. 요청을 보낸 때부터 응답의 첫 조각과 마지막 조각이 도착한 때까지이며, "
        "네트워크 시간을 포함합니다.",
    ),
    "method_tokens": (
        "Token counts are those that the server reported.",
        "토큰 수는 서버가 알려 준 값입니다.",
    ),
    "method_kinds": (
        "Values without a mark were measured. “Computed” values follow from measured ones, such as the time of one "
        "request times their number; “forecast” values come from a plan or a source and were not measured.",
        "표시가 없는 값은 측정값입니다. “계산”은 측정값으로 계산한 값(예: 요청 한 건의 시간 × 개수)이고, “예상”은 계획이나 "
        "다른 자료의 값으로 측정하지 않았습니다.",
    ),
    "method_content": (
        "This report holds no prompt, no answer and no key.",
        "이 보고서에는 프롬프트, 응답, 키가 들어 있지 않습니다.",
    ),
    "column_metric": ("metric", "지표"),
    "column_mean": ("mean", "평균"),
    "column_median": ("median", "중앙값"),
    "needs": ("needs {needs}", "{needs}개 필요"),
}

_UNITS: dict[str, tuple[str, str]] = {
    "s": (" s", "초"),
    "ms": (" ms", " ms"),
    "x": ("×", "배"),
    "%": (" %", " %"),
    "pp": (" pp", " %p"),
    "tok/s": (" tok/s", " 토큰/초"),
    "req/s": (" req/s", " 요청/초"),
    "GiB": (" GiB", " GiB"),
    "points": ("", "점"),
}


def text(key: str, lang: Lang, **figures: object) -> str:
    """Return a text; a key without one is shown as words, since a report never fails for lack of a text."""
    for source in (_TEXTS, COMPARE_TEXTS):
        if key in source:
            found = source[key][lang == "ko"]
            return found.format(**figures) if figures else found
    if texts.has(key):
        try:
            return texts.text(key, lang, figures or None)
        except (KeyError, ValueError, TypeError):
            return texts.text(key, lang)
    return key.replace("_", " ")


def number(value: CellValue, unit: str = "", lang: Lang = "en") -> str:
    """Return a value with its unit, with about three significant digits."""
    if value is None:
        return text("none", lang)
    if isinstance(value, str):
        return value
    return f"{digits(value)}{_UNITS.get(unit, ('', ''))[lang == 'ko']}"


def digits(value: float) -> str:
    """Return a number with about three significant digits, and thousands apart."""
    size = abs(value)
    if not value:
        return "0"
    if value == int(value) and size < 1e15 and (isinstance(value, int) or size >= 100):
        return f"{int(value):,}"
    places = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 0.1 else 3
    shown = f"{value:,.{places}f}"
    return shown if float(shown.replace(",", "")) else f"{value:.1e}"


def date(stamp: str) -> str:
    """Return `YYYYMMDD-HHMMSS` as a date and a time for people."""
    digits_only = stamp.replace("_", "-")
    if len(digits_only) != 15 or digits_only[8] != "-":
        return stamp
    d, t = digits_only.split("-")
    return f"{d[:4]}-{d[4:6]}-{d[6:]} {t[:2]}:{t[2:4]}:{t[4:]}"
