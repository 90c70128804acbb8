"""Every text of a report, in English and Korean."""

from collections.abc import Mapping
from typing import Literal

Language = Literal["en", "ko"]

_TEXTS: dict[str, tuple[str, str]] = {
    # Titles
    "scenario_concurrency": ("Requests at once", "동시 요청 처리"),
    "scenario_text-parallel": ("Text prompts, one after the other and at once", "텍스트 순차·병렬 비교"),
    "scenario_vision-batch": ("Images in batches", "이미지 배치 처리"),
    "scenario_multi-model": ("Several models and languages at once", "다중 모델·다국어 동시 실행"),
    "scenario_users": ("Users at once", "동시 사용자 수"),
    "scenario_load": ("Load", "부하 시험"),
    "scenario_soak": ("Long run", "장시간 시험"),
    "title": ("Benchmark", "벤치마크 결과"),
    "metrics": ("Metrics", "지표"),
    "run_figures": ("Counts and rates of the main run: {run}", "주 실행의 건수와 처리율: {run}"),
    "run_metrics": ("Latencies of the main run: {run}", "주 실행의 지연 시간: {run}"),
    "verdict": ("Verdict", "판정"),
    "rule": ("Rule", "판정 기준"),
    "notes": ("Notes", "참고"),
    "client": ("Load client", "부하 클라이언트"),
    "failures_by_kind": ("Failures by kind", "실패 유형"),
    "concurrency_totals": ("All requests of a level together", "동시 요청 수별 합계"),
    "concurrency_requests": ("Each request", "요청별 결과"),
    "text_parallel": ("One after the other and at once", "순차와 병렬"),
    "multi_model": ("One after the other and at once", "순차와 동시 실행"),
    "requests_in_turn": ("Each request, one after the other", "요청별 결과 (순차)"),
    "requests_together": ("Each request, at once", "요청별 결과 (동시)"),
    "vision_batch": ("Files at once", "파일 수별 결과"),
    "users": ("Users at once", "동시 사용자 수"),
    "users_levels": ("Measured levels", "측정한 사용자 수별 결과"),
    "soak": ("Windows", "구간별 결과"),
    "replay": ("Recorded and replayed", "기록과 재생"),
    # Facts
    "target": ("Target", "대상"),
    "model": ("Model", "모델"),
    "api": ("API", "API"),
    "date": ("Date", "일시"),
    "metadata": ("Metadata", "메타데이터"),
    "interrupted": (
        "Interrupted: this is what was measured until then.",
        "중단됨: 그때까지 측정한 결과입니다.",
    ),
    # Columns
    "request": ("request", "요청"),
    "time": ("time", "응답 시간"),
    "ttft": ("first token", "첫 토큰"),
    "gateway_queue": ("queued", "대기열"),
    "tokens": ("tokens", "토큰"),
    "speed": ("tokens/s", "토큰/초"),
    "outcome": ("outcome", "결과"),
    "at_once": ("at once", "동시 요청"),
    "total": ("total time", "총 시간"),
    "fastest": ("fastest", "최소 시간"),
    "slowest": ("slowest", "최대 시간"),
    "in_turn_computed": ("one after the other", "순차 처리 예상"),
    "difference_computed": ("difference", "차이"),
    "speedup": ("speed-up", "속도 향상"),
    "generating_at_once": ("generated at once", "동시 생성 수"),
    "failures": ("failures", "실패"),
    "mode": ("mode", "모드"),
    "mean_per_request": ("per request", "평균/요청"),
    "files": ("files", "파일 수"),
    "per_file": ("per file", "파일당 시간"),
    "forecast": ("plan", "계획값"),
    "criterion": ("criterion", "시나리오"),
    "users_at_once": ("users at once", "동시 사용자"),
    "ttft_median": ("first token, median", "첫 토큰 중앙값"),
    "ttft_slowest": ("first token, slowest", "첫 토큰 최대"),
    "time_slowest": ("answer, slowest", "응답 시간 최대"),
    "speed_per_user": ("tokens/s per user", "사용자당 토큰/초"),
    "output_throughput": ("tokens/s in sum", "전체 토큰/초"),
    "meets": ("meets", "충족 기준"),
    "window": ("window", "구간"),
    "until": ("until", "경과"),
    "answers": ("answers", "응답 수"),
    "e2el_median": ("latency, median", "지연 중앙값"),
    "e2el_p95": ("latency, p95", "지연 p95"),
    "metric": ("metric", "지표"),
    "mean": ("mean", "평균"),
    "median": ("median", "중앙값"),
    "std": ("std. deviation", "표준편차"),
    "value": ("value", "값"),
    "recorded": ("recorded", "기록"),
    "replayed": ("replayed", "재생"),
    "replay_ratio": ("ratio", "비율"),
    "replay_ttft_p50": ("first token, median", "첫 토큰 중앙값"),
    "replay_ttft_p95": ("first token, p95", "첫 토큰 p95"),
    "replay_ttft_p99": ("first token, p99", "첫 토큰 p99"),
    "replay_e2el_p50": ("whole answer, median", "전체 응답 중앙값"),
    "replay_e2el_p95": ("whole answer, p95", "전체 응답 p95"),
    "replay_e2el_p99": ("whole answer, p99", "전체 응답 p99"),
    "replay_requests": ("requests", "요청 수"),
    "replay_prompt_tokens": ("input tokens", "입력 토큰"),
    "replay_output_tokens": ("output tokens", "출력 토큰"),
    # Cells
    "in_turn": ("one after the other", "순차"),
    "together": ("at once", "동시"),
    "ok": ("ok", "정상"),
    "warm-up": ("warm-up", "예열"),
    "realtime": ("real time", "실시간 응답"),
    "within_wait": ("within the wait", "대기 허용"),
    "at_most": ("at most", "최대 동시 처리"),
    "meets_none": ("none", "없음"),
    "incomplete": ("interrupted", "중단됨"),
    # Marks of cells
    "measured": ("measured", "측정"),
    "computed": ("computed", "계산"),
    "forecast_kind": ("forecast", "예상"),
    "n_too_small": ("n too small", "표본 부족"),
    "until_last_failure": ("until the last failure", "마지막 실패까지"),
    "limit_of_search": ("or more: the search ended here", "이상: 탐색 한도"),
    "gap_above": ("or more: the next level that was measured is too many", "이상: 다음 측정 단계는 초과"),
    # Metrics
    "metric_ttft": ("Time to first token (TTFT)", "첫 토큰까지 시간 (TTFT)"),
    "metric_tpot": ("Time per output token after the first (TPOT)", "첫 토큰 이후 토큰당 시간 (TPOT)"),
    "metric_itl": ("Inter-token latency (ITL)", "토큰 간 지연 (ITL)"),
    "metric_e2el": ("End-to-end latency (E2EL)", "전체 지연 (E2EL)"),
    "metric_client_queue_time": ("Wait in the client (client queue time)", "클라이언트 대기 시간"),
    "metric_e2el_including_client_queue": ("Latency with the wait in the client", "클라이언트 대기 포함 지연"),
    "figure_completed": ("Successful requests", "성공 요청"),
    "figure_failed": ("Failed requests", "실패 요청"),
    "figure_duration": ("Duration (s)", "소요 시간 (초)"),
    "figure_total_input_tokens": ("Input tokens", "입력 토큰"),
    "figure_total_output_tokens": ("Output tokens", "출력 토큰"),
    "figure_request_throughput": ("Requests per second", "초당 요청"),
    "figure_request_goodput": ("Requests per second within the limits (goodput)", "기준을 지킨 초당 요청 (goodput)"),
    "figure_output_throughput": ("Output tokens per second, in sum", "초당 출력 토큰 (전체)"),
    "figure_output_throughput_per_user": ("Output tokens per second, per user", "초당 출력 토큰 (사용자당)"),
    "figure_total_token_throughput": ("Input and output tokens per second", "초당 입출력 토큰"),
    "figure_max_output_tokens_per_s": ("Most pieces within a second", "1초간 최대 출력 조각"),
    "figure_max_concurrent_requests": ("Most requests in flight within a second", "1초간 최대 동시 요청"),
    "figure_probe_completed": ("Probes beside the load: successful", "탐침 요청 성공"),
    "figure_probe_failed": ("Probes beside the load: failed", "탐침 요청 실패"),
    "figure_probe_median_e2el_ms": ("Latency of a probe, median (ms)", "탐침 지연 중앙값 (ms)"),
    "figure_probe_p99_e2el_ms": ("Latency of a probe, p99 (ms)", "탐침 지연 p99 (ms)"),
    "figure_probe_max_e2el_ms": ("Latency of a probe, longest (ms)", "탐침 지연 최대 (ms)"),
    # Verdicts
    "batched": (
        "Batched: the server generated {n} answers at the same time (on average {average:.1f}).",
        "병렬 처리: 서버가 {n}개 응답을 동시에 생성했습니다 (평균 {average:.1f}개).",
    ),
    "serial": (
        "Serial: the server generated one answer after the other (on average {average:.1f} of {n} at once).",
        "순차 처리: 서버가 응답을 하나씩 차례로 생성했습니다 ({n}개 중 평균 {average:.1f}개 동시 생성).",
    ),
    "limited": (
        "Limited: of {n} requests the server generated about {average:.1f} at once.",
        "제한적 병렬 처리: 요청 {n}개 중 약 {average:.1f}개를 동시에 생성했습니다.",
    ),
    "unclear": (
        "No verdict: too few complete answers.",
        "판정 불가: 완전한 응답이 부족합니다.",
    ),
    "rule_overlap": (
        (
            "An answer is being generated from its first to its last piece. With N requests at once: batched if on "
            "average at least {batched:.0f} % of N were generated at once, serial below {serial}, limited in between."
        ),
        (
            "첫 조각부터 마지막 조각까지를 생성 중으로 봅니다. 동시 요청 N개 중 평균 {batched:.0f} % 이상이 동시에 "
            "생성되면 병렬, {serial}개 미만이면 순차, 그 사이면 제한적 병렬입니다."
        ),
    ),
    "full_gain": (
        "{n} at once: {speedup:.2f} times as fast as one after the other, nearly all of what is possible.",
        "{n}개 동시: 순차보다 {speedup:.2f}배 빠름, 거의 완전한 병렬화입니다.",
    ),
    "partial_gain": (
        "{n} at once: {speedup:.2f} times as fast as one after the other.",
        "{n}개 동시: 순차보다 {speedup:.2f}배 빠릅니다.",
    ),
    "no_gain": (
        "{n} at once: as fast as one after the other ({speedup:.2f} times).",
        "{n}개 동시: 순차와 같은 속도입니다 ({speedup:.2f}배).",
    ),
    "slower_together": (
        "{n} at once: slower than one after the other ({speedup:.2f} times). The requests hinder each other.",
        "{n}개 동시: 순차보다 느립니다 ({speedup:.2f}배). 요청들이 서로 방해합니다.",
    ),
    "files_failed": (
        "{n} at once: {failed} failed.",
        "{n}개 동시: {failed}개가 실패했습니다.",
    ),
    "rule_speedup": (
        (
            "Speed-up: time of one file or request after the other, divided by the time at once. Below 0.9 slower, "
            "below 1.2 no gain, from 0.9 times their number on a full gain."
        ),
        (
            "속도 향상: 순차 처리 시간을 동시 처리 시간으로 나눈 값. 0.9 미만은 느려짐, 1.2 미만은 효과 없음, "
            "개수의 0.9배 이상은 완전한 병렬화입니다."
        ),
    ),
    "users_found": (
        "Users at once: {users_realtime} in real time, {users_within_wait} within {wait:g} s, {users_at_most} at most.",
        "동시 사용자: 실시간 {users_realtime}명, {wait:g}초 대기 허용 {users_within_wait}명, 최대 {users_at_most}명.",
    ),
    "rule_users": (
        (
            "Each user sends {rounds} questions one after the other, with answers of up to {tokens} tokens. Real time: "
            "first token within {ttft:g} s, then at least {speed:g} tokens/s. Within the wait: whole answer within "
            "{wait:g} s. {share:.0f} % of a level's requests have to be so fast (all, if fewer than 20). At most: "
            "every answer complete within {timeout:g} s."
        ),
        (
            "사용자마다 질문 {rounds}개를 차례로 보내고 응답은 최대 {tokens}토큰입니다. 실시간: 첫 토큰 "
            "{ttft:g}초 이내, 이후 초당 {speed:g}토큰 이상. 대기 허용: 전체 응답 {wait:g}초 이내. 각 단계 요청의 "
            "{share:.0f} % 이상(20개 미만이면 전부)이 이를 충족해야 합니다. 최대: 모든 응답이 {timeout:g}초 이내에 "
            "완료되어야 합니다."
        ),
    ),
    "steady": (
        "Steady: the median latency of the last third is {drift:.2f} times that of the first.",
        "안정적: 마지막 1/3의 지연 중앙값이 처음 1/3의 {drift:.2f}배입니다.",
    ),
    "slowing": (
        "Slowing down: the median latency of the last third is {drift:.2f} times that of the first.",
        "느려짐: 마지막 1/3의 지연 중앙값이 처음 1/3의 {drift:.2f}배입니다.",
    ),
    "rule_drift": (
        (
            "Slowing down if the last third of the windows has more than {limit} times the median latency of the "
            "first; it takes three windows."
        ),
        (
            "마지막 1/3 구간의 지연 중앙값이 처음 1/3의 {limit}배를 넘으면 느려짐으로 봅니다. "
            "구간이 3개 이상 필요합니다."
        ),
    ),
    "replay_carried": (
        (
            "Carried: of {total} requests at {speed:g} times the recorded speed {failed} failed "
            "({recorded_failed} in the recording). 95 % of the answers took up to {now:.2f} s, "
            "and {then:.2f} s in the recording."
        ),
        (
            "감당함: 기록의 {speed:g}배 속도로 보낸 요청 {total}건 중 {failed}건 실패 "
            "(기록에서는 {recorded_failed}건). 응답의 95 %가 {now:.2f}초 이내, 기록에서는 {then:.2f}초."
        ),
    ),
    "replay_slower": (
        (
            "Slower: of {total} requests at {speed:g} times the recorded speed {failed} failed "
            "({recorded_failed} in the recording), but 95 % of the answers took up to {now:.2f} s, "
            "and {then:.2f} s in the recording."
        ),
        (
            "더 느림: 기록의 {speed:g}배 속도로 보낸 요청 {total}건 중 {failed}건 실패 "
            "(기록에서는 {recorded_failed}건). 응답의 95 %가 {now:.2f}초 이내로, "
            "기록의 {then:.2f}초보다 느립니다."
        ),
    ),
    "replay_failed": (
        (
            "Not carried: of {total} requests at {speed:g} times the recorded speed {failed} failed, "
            "{recorded_failed} in the recording."
        ),
        (
            "감당하지 못함: 기록의 {speed:g}배 속도로 보낸 요청 {total}건 중 {failed}건 실패, "
            "기록에서는 {recorded_failed}건."
        ),
    ),
    "rule_replay": (
        (
            "Carried if no more fail than in the recording and {allowance:g} % of all, and the p95 of the "
            "whole answer is at most {slower:.0f} % above the recorded one."
        ),
        (
            "실패가 기록의 실패 수에 전체의 {allowance:g} %를 더한 것보다 많지 않고, "
            "전체 응답의 p95가 기록보다 {slower:.0f} % 넘게 느리지 않으면 감당한 것으로 봅니다."
        ),
    ),
    # Notes
    "replay_skipped": (
        "The recording has requests that are not chats, such as embeddings; they were not sent.",
        "기록에 임베딩처럼 채팅이 아닌 요청이 있으며, 이는 보내지 않았습니다.",
    ),
    "replay_unreadable": (
        "Some lines of the recording could not be read.",
        "기록에서 읽을 수 없는 줄이 있습니다.",
    ),
    "length_estimated": (
        "The server did not tell how many tokens a prompt has: lengths of made-up prompts are estimated.",
        "서버가 입력 토큰 수를 알려 주지 않아 생성한 프롬프트의 길이는 추정값입니다.",
    ),
    "images_made": ("The images were made by the benchmark.", "이미지는 벤치마크가 생성했습니다."),
    "images_repeated": (
        (
            "There are fewer files than the largest level needs: files were sent more than once, and the server may "
            "have cached them."
        ),
        "파일 수가 가장 큰 단계보다 적어 같은 파일을 여러 번 보냈으며, 서버가 캐시했을 수 있습니다.",
    ),
    "ollama_ignores_eos": (
        "Ollama has no ignore_eos: answers may be shorter than asked for.",
        "Ollama에는 ignore_eos가 없어 응답이 지정한 길이보다 짧을 수 있습니다.",
    ),
    "kinds_explained": (
        "“computed” follows from measured values and was not measured itself; “forecast” is what a plan expects.",
        "“계산”은 측정값에서 계산한 값이고, “예상”은 계획이 기대하는 값입니다. 둘 다 측정한 값이 아닙니다.",
    ),
    "client_busy": (
        (
            "The load client used {cpu:.0f} % of a core: it may be the bottleneck. Use fewer requests at once, or "
            "several clients."
        ),
        (
            "부하 클라이언트가 CPU 코어의 {cpu:.0f} %를 사용해 병목일 수 있습니다. 동시 요청을 줄이거나 "
            "클라이언트를 나누세요."
        ),
    ),
    "client_lagging": (
        "The load client's event loop was up to {lag:.0f} ms late (p99): times are uncertain by as much.",
        "부하 클라이언트의 이벤트 루프가 최대 {lag:.0f} ms(p99) 늦어 그만큼 시간이 부정확합니다.",
    ),
    "client_late": (
        "Requests were sent up to {delay:.0f} ms (p99) after they were due.",
        "요청이 예정보다 최대 {delay:.0f} ms(p99) 늦게 전송되었습니다.",
    ),
    "client_line": (
        "{cpu:.0f} % of a core, event loop late by {lag:.1f} ms (p99), {most:.1f} ms at most",
        "CPU 코어의 {cpu:.0f} %, 이벤트 루프 지연 {lag:.1f} ms (p99), 최대 {most:.1f} ms",
    ),
}


def has(key: str) -> bool:
    """Return whether there is such a text."""
    return key in _TEXTS


def text(key: str, language: Language, figures: Mapping[str, object] | None = None) -> str:
    """Return a text, filled in with `figures`; without them, braces stay as they are.

    Raises:
        KeyError: there is no such text.
    """
    found = _TEXTS[key][language == "ko"]
    return found if figures is None else found.format(**figures)


def text_or_key(key: str, language: Language) -> str:
    """Return the text, or the key itself if there is none, as for the kind of a failure."""
    return _TEXTS[key][language == "ko"] if key in _TEXTS else key
