"""Texts of comparisons and of quality scores, in English and Korean."""

COMPARE_TEXTS: dict[str, tuple[str, str]] = {
    "scenario_compare": ("Comparison", "성능 비교"),
    "compare_title": ("Performance comparison", "성능 비교 보고서"),
    "compare_title_one": ("Performance of one side", "단일 대상 성능 보고서"),
    "compare_lead": (
        "{rounds} rounds in turn, {requests} requests a side",
        "{rounds}회 교대 측정, 대상별 요청 {requests}개",
    ),
    "compare_lead_files": ("From result files; the sides were not measured in turn", "결과 파일 비교, 교대 측정 아님"),
    "compare_lead_one": ("{rounds} rounds, {requests} requests", "{rounds}회 측정, 요청 {requests}개"),
    # Rows
    "group_cold": ("Cold start", "초기 로딩"),
    "group_warm": ("Warm", "연속 응답"),
    "group_figures": (
        "Figures of the scenario, one value a side and without an interval",
        "시나리오 수치 (대상별 한 값, 신뢰구간 없음)",
    ),
    "row_load_time": ("Load time", "초기 로딩 시간"),
    "row_cold_response": ("First answer after the load", "로딩 직후 첫 응답 시간"),
    "row_cold_speed": ("Tokens per second of the first answer", "로딩 직후 TPS"),
    "row_cold_gpu_memory": ("GPU memory during load and first answer", "초기 로딩 GPU 메모리"),
    "row_cold_gpu": ("GPU use during load and first answer", "초기 로딩 GPU 사용률"),
    "row_response": ("Response time, median", "응답 시간 (중앙값)"),
    "row_speed": ("Tokens per second, each user", "사용자당 TPS"),
    "row_ttft": ("Time to first token, median", "첫 토큰까지 시간 (중앙값)"),
    "row_tpot": ("Time per output token, median", "토큰당 시간 (중앙값)"),
    "row_throughput": ("Tokens per second, in sum", "전체 TPS"),
    "row_requests": ("Requests per second", "초당 요청"),
    "row_failed": ("Failed requests", "실패한 요청"),
    "row_gpu_memory": ("GPU memory", "GPU 메모리"),
    "row_gpu": ("GPU use", "GPU 사용률"),
    "row_kv_cache": ("KV cache in use, most", "KV 캐시 사용률 (최대)"),
    "row_model_memory": ("Memory of the model", "모델 메모리"),
    # Columns
    "col_metric": ("metric", "지표"),
    "col_difference": ("difference (B − A)", "차이 (B − A)"),
    "col_ratio": ("B ÷ A with 95 % interval", "B ÷ A (95 % 신뢰구간)"),
    "col_better": ("better", "더 나은 쪽"),
    "better_same": ("no difference seen", "차이 없음"),
    "better_unknown": ("cannot be said", "판단 불가"),
    "better_neither": ("–", "–"),
    # Verdicts
    "verdict_counts": (
        "Of {all} metrics, {a} is better in {a_rows} and {b} in {b_rows}; no difference was seen in {same_rows}.",
        "지표 {all}개 중 {a} 우세 {a_rows}개, {b} 우세 {b_rows}개, 차이 없음 {same_rows}개입니다.",
    ),
    "verdict_speed": (
        "{metric}: {winner} reaches {factor} the other's value ({low} to {high}).",
        "{metric}: {winner}, 상대의 {factor} ({low}~{high}).",
    ),
    "verdict_same_speed": (
        "{metric}: no difference seen, B ÷ A = {estimate} ({low} to {high}).",
        "{metric}: 차이가 나타나지 않음, B ÷ A = {estimate} ({low}~{high}).",
    ),
    "verdict_one": (
        "Only one side was measured: nothing can be said about which is better.",
        "한쪽만 측정했으므로 어느 쪽이 나은지 말할 수 없습니다.",
    ),
    "verdict_no_interval": (
        "One run a side: the figures differ, but nothing shows whether by more than chance.",
        "대상별 한 번만 측정해 차이가 우연인지 판단할 수 없습니다.",
    ),
    # Sections
    "section_compare": ("Side by side", "지표 비교"),
    "section_cold": ("Cold start", "초기 로딩"),
    "section_quality": ("Quality of the answers", "응답 품질"),
    "section_requests": ("Requests", "요청별 분포"),
    "table_compare": ("All metrics", "전체 지표"),
    "forest_title": ("B compared with A", "A 대비 B"),
    "forest_hint": (
        "Ratio B ÷ A with its 95 % interval. An interval that holds 1 shows no difference. Coloured: the better side.",
        "B ÷ A 비율과 95 % 신뢰구간입니다. 구간에 1이 들어 있으면 차이가 나타나지 않은 것입니다. 색은 더 나은 쪽입니다.",
    ),
    "forest_left": ("B less", "B가 작음"),
    "forest_right": ("B more", "B가 큼"),
    "bars_rounds": ("Tokens per second, round by round", "회차별 초당 토큰"),
    "bars_rounds_hint": (
        "Both sides of a round were measured one after the other. A longer bar is better.",
        "한 회차의 두 대상은 연달아 측정했습니다. 막대가 길수록 좋습니다.",
    ),
    "round": ("round {number}", "{number}회차"),
    # Quality
    "quality_table": ("Total score by scenario (0 to 5)", "시나리오별 종합 점수 (0~5)"),
    "quality_dimensions": ("Mean of each score (0 to 5)", "항목별 평균 점수 (0~5)"),
    "quality_bars": ("Total score by scenario", "시나리오별 종합 점수"),
    "col_scenario": ("scenario", "시나리오"),
    "col_score": ("score", "항목"),
    "col_interval": ("B − A with 95 % interval", "B − A (95 % 신뢰구간)"),
    "scenario_mean": ("Mean", "평균 점수"),
    "accuracy": ("accuracy", "정확성"),
    "consistency": ("consistency", "일관성"),
    "code_quality": ("code quality", "코드 품질"),
    "clarity": ("clarity", "명확성"),
    "quality_one_side": (
        "No recommendation: only one side was scored, and one model alone shows nothing about another.",
        "추천 없음: 한쪽 모델만 평가했으므로 비교할 수 없습니다.",
    ),
    "quality_unlike_tasks": (
        "No recommendation: the sides had different tasks or were asked in different ways.",
        "추천 없음: 두 대상의 과제나 질문 방식이 다릅니다.",
    ),
    "quality_many_failures": (
        "No recommendation: more than a tenth of a side's answers failed.",
        "추천 없음: 한쪽 응답의 10 % 넘게 실패했습니다.",
    ),
    "quality_no_difference": (
        "No difference seen in the quality of the answers.",
        "응답 품질에서 차이가 나타나지 않았습니다.",
    ),
    "quality_prefer_a": ("A gives the better answers in these tasks.", "이 과제들에서는 A의 응답이 더 좋습니다."),
    "quality_prefer_b": ("B gives the better answers in these tasks.", "이 과제들에서는 B의 응답이 더 좋습니다."),
    "quality_method": (
        "{tasks} tasks, each asked {repeats} times at temperature {temperature:g}. Total = 0.5 accuracy + 0.2 "
        "consistency + 0.15 code quality + 0.15 clarity, over the scores that a task has. A scenario's interval is "
        "Welch's over the repeats, the mean row's Student's over the tasks in pairs, both 95 %.",
        "과제 {tasks}개를 온도 {temperature:g}에서 {repeats}번씩 물었습니다. 종합 = 정확성 0.5 + 일관성 0.2 + 코드 품질 0.15 "
        "+ 명확성 0.15 (과제에 있는 항목만). 시나리오의 구간은 반복 간 Welch, 평균 행의 구간은 과제별 쌍의 Student t이며 모두 "
        "95 %입니다.",
    ),
    "quality_by_checks": (
        "Scored by stated checks: code that passes its tests, JSON with the right values, required points by their "
        "words. A model that names a point without understanding it has the point too.",
        "명시된 검사로 채점했습니다: 테스트를 통과하는 코드, 값이 맞는 JSON, 필수 항목의 단어 포함 여부. 이해하지 못하고 단어만 "
        "써도 점수를 받습니다.",
    ),
    "quality_by_judge": (
        "Graded by the model {judge}, without the name of the side; code and JSON were checked by a program.",
        "모델 {judge}이(가) 대상 이름 없이 채점했고, 코드와 JSON은 프로그램이 검사했습니다.",
    ),
    "quality_losses": (
        "{side}: of {all} answers {failed} failed and {cut} were cut off at max_tokens. A model that thinks may use up "
        "its tokens before it answers.",
        "{side}: 응답 {all}개 중 {failed}개 실패, {cut}개는 max_tokens에서 잘렸습니다. 사고하는 모델은 답하기 전에 토큰을 다 쓸 수 있습니다.",
    ),
    "quality_judge_is_side": (
        "The judge is one of the compared models: models favour their own answers.",
        "채점 모델이 비교 대상 중 하나입니다. 모델은 자기 응답에 후한 점수를 주는 경향이 있습니다.",
    ),
    "quality_guards": (
        "Code ran in processes with limits, in a temporary folder and without network; guards of the kernel that held: "
        "{guards}.",
        "코드는 제한된 프로세스에서 임시 폴더를 두고 네트워크 없이 실행했습니다. 작동한 커널 보호: {guards}.",
    ),
    "guards_none": ("none, Python's audit hook alone", "없음 (Python 감사 훅만 사용)"),
    # Method
    "method_paired": (
        "The sides took turns, A B A B. Each round is a pair, so that a machine that slowly changes acts on both. "
        "Interval: 95 %, Student's t over the {n} rounds; of ratios over their logarithms. Each row has its own "
        "interval: of many rows without a difference one in twenty shows one.",
        "두 대상을 A B A B 순서로 교대로 측정했습니다. 한 회차가 한 쌍이므로 장비 상태의 느린 변화는 양쪽에 똑같이 작용합니다. "
        "신뢰구간은 {n}개 회차의 Student t 95 %이며, 비율은 로그로 계산합니다. 행마다 구간이 따로이므로, 차이가 없는 행도 20개 중 "
        "1개꼴로 차이가 있는 것처럼 보일 수 있습니다.",
    ),
    "method_files": (
        "The sides were not measured in turn, so that a change of the machine between them counts as a difference. "
        "Interval: 95 %, Welch's, over rounds where both have several, else over single requests, which are not "
        "independent of each other.",
        "교대로 측정하지 않았으므로 측정 사이의 장비 변화도 차이로 나타납니다. 신뢰구간은 Welch 95 %이며, 회차가 여럿이면 "
        "회차, 아니면 서로 독립이 아닌 개별 요청으로 계산합니다.",
    ),
    "method_values": (
        "Values are means over the rounds; within a round, response time and first token are medians of its requests.",
        "값은 회차별 값의 평균이며, 회차 안의 응답 시간과 첫 토큰 시간은 요청의 중앙값입니다.",
    ),
    "method_better": (
        "“Better” is named only where the interval excludes equality. GPU memory and use have no better direction: "
        "vLLM reserves memory by its settings, and use is a matter of load.",
        "신뢰구간이 ‘같음’을 포함하지 않을 때만 더 나은 쪽을 표시합니다. GPU 메모리와 사용률은 어느 쪽이 좋다고 할 수 없습니다. "
        "vLLM은 설정에 따라 메모리를 미리 잡고, 사용률은 부하에 따라 달라집니다.",
    ),
    "method_gpu": (
        "GPU values are of this machine's GPUs and all programs on them. Not seen: no NVML here, or the server is on "
        "another machine.",
        "GPU 값은 이 장비의 GPU와 그 위의 모든 프로그램에 대한 것입니다. 측정 안 됨: NVML이 없거나 서버가 다른 장비에 있습니다.",
    ),
    "cold_no_api": (
        "Load time of {side} was not seen: it has no API to unload a model.",
        "{side}의 로딩 시간은 측정하지 못했습니다: 모델을 내리는 API가 없습니다.",
    ),
    "cold_not_unloaded": (
        "Load time of {side} was not seen: the model stayed loaded when asked to unload.",
        "{side}의 로딩 시간은 측정하지 못했습니다: 모델이 내려가지 않았습니다.",
    ),
    "cold_not_loaded": (
        "Load time of {side} was not seen: an empty prompt did not load the model.",
        "{side}의 로딩 시간은 측정하지 못했습니다: 빈 프롬프트로 모델이 로드되지 않았습니다.",
    ),
    "cold_not_asked": (
        "Load times were not measured; --cold loads the model of an Ollama in each round, or restarts a server that "
        "--start-a or --start-b started.",
        "로딩 시간은 측정하지 않았습니다. --cold를 주면 회차마다 Ollama의 모델을 다시 올리거나 --start-a, --start-b로 시작한 서버를 다시 시작합니다.",
    ),
    "unlike_models": (
        "The sides run different models ({a}, {b}): differences are those of model and engine together.",
        "두 대상의 모델이 다릅니다 ({a}, {b}). 차이는 모델과 엔진을 합친 것입니다.",
    ),
    "forced": (
        "The workloads differ, and were compared because of --force: {fields}.",
        "작업 부하가 다르지만 --force로 비교했습니다: {fields}.",
    ),
    "few_rounds": (
        "Fewer than 3 rounds: the intervals are very wide.",
        "회차가 3개 미만이라 신뢰구간이 매우 넓습니다.",
    ),
    "rounds_incomplete": (
        "Interrupted: only complete rounds count.",
        "중단됨: 완료된 회차만 집계했습니다.",
    ),
    "quality": ("quality tasks", "품질 과제"),
}
