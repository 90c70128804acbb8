"""Texts of `gateway advise` in Korean; `texts_en.py` has the same keys and figures."""

TEXTS = {
    "measured": "측정",
    "computed": "계산",
    "assumed": "가정",
    "setting": "설정",
    "value": "값",
    "backend": "백엔드",
    "origin": "근거",
    "why": "이유",
    "nothing": "이 데이터로는 권장값을 말할 수 없습니다.",
    "met": "이 설정으로 목표를 충족합니다.",
    "not_met": "목표를 충족하지 못합니다.",
    # A benchmark
    "level": "동시 {at_once}건: 초당 {rate:.2f}건, {tokens:.1f}토큰/초, 지연 중앙값 {latency:.2f}초, "
    "{requests}건 중 {failed}건 실패{values}",
    "level_too_few": "동시 {at_once}건: 초당 {rate:.2f}건, {tokens:.1f}토큰/초, 지연 중앙값 {latency:.2f}초, "
    "{requests}건 중 {failed}건 실패{values} (표본이 적어 백분위 대신 가장 느린 요청을 씀)",
    "too_few_levels": "결과에 동시 요청 단계가 {levels}개뿐입니다. 두 단계 이상이 필요합니다: gateway bench users 또는 "
    "gateway bench concurrency --levels 1,2,4,8.",
    "saturated": "포화: 동시 {at_once}건부터 처리량이 초당 {rate:.2f}건({tokens:.1f}토큰/초)에서 늘지 않습니다. "
    "더 보내면 느려지기만 합니다.",
    "not_saturated": "포화되지 않음: 동시 {at_once}건까지 처리량이 계속 늘어, 서버의 최대치는 이 데이터로 말할 수 "
    "없습니다.",
    "serial": "서버가 요청을 하나씩 처리합니다. 동시 {at_once}건이 한 건보다 빠르지 않습니다.",
    "met_up_to": "{targets}: 동시 {at_once}건까지 충족.",
    "never_met": "{targets}: 동시 {at_once}건에서도 충족하지 못합니다. 설정으로는 해결되지 않으며, 더 작은 모델, "
    "더 짧은 응답 또는 더 빠른 하드웨어가 필요합니다.",
    "why_level": "선택한 측정 단계: 동시 {at_once}건에서 초당 {rate:.2f}건",
    "why_parallel": "서버도 같은 수를 동시에 실행해야 함; 요청마다 컨텍스트 메모리가 필요",
    "why_seqs": "엔진의 동시 실행 수가 이보다 적으면 안 됨",
    "why_queue": "대기 허용 시간 × 처리율: {patience:.1f}초 × 초당 {rate:.2f}건; 그 뒤는 더 오래 기다림",
    "why_timeout": "대기열에서 {patience:.1f}초가 지나면 목표를 지킬 수 없음",
    "users_fit": "동시 사용자 {users}명: 슬롯 {slots}개 안에서 모두 바로 처리됩니다.",
    "users_queue": "동시 사용자 {users}명: {slots}명은 바로 처리, 나머지는 대기; 마지막은 {last:.1f}초 대기 (허용 "
    "{patience:.1f}초).",
    "users_too_many": "동시 사용자 {users}명: {slots}명은 바로 처리되지만 마지막은 {last:.1f}초를 기다려 허용 시간 "
    "{patience:.1f}초를 넘습니다. 이런 서버가 {servers}대 필요합니다.",
    # Metrics
    "too_few_requests": "요청 {requests:.0f}건으로는 말할 수 없습니다. {needed}건 이상이 필요합니다.",
    "little": "리틀의 법칙: 초당 {rate:.3f}건 × 백엔드에서 {service:.2f}초 = 평균 동시 {at_once:.2f}건 "
    "({period:.0f}초 동안 {requests:.0f}건)",
    "slots": "설정상 슬롯 {slots}개, 평균 {share:.0f} % 사용; 평균 대기 {wait:.2f}초",
    "slots_learned": "게이트웨이가 학습한 슬롯 {slots}개, 평균 {share:.0f} % 사용; 평균 대기 {wait:.2f}초",
    "long_period": "{hours:.0f}시간의 평균이라 바쁜 시간대가 드러나지 않습니다. 바쁠 때 --seconds로 보거나 "
    "트래픽을 기록해 재생하세요.",
    "mixed": "요청의 {share:.0f} %에 이미지가 있고 별도 대기열에서 평균 {wait:.2f}초 기다립니다. "
    "처리 시간은 둘을 합친 값입니다.",
    "rejected": "거부: {reasons}",
    "full": "슬롯의 평균 {share:.0f} %가 사용 중입니다. {full:.0f} %를 넘으면 요청이 몰릴 때마다 대기열이 길어집니다.",
    "target_met": "{target}: 충족 ({value:.0f})",
    "target_missed": "{target}: 미달 ({value:.0f})",
    "no_figure": "{target}: 게이트웨이 메트릭에 없습니다. gateway bench로 측정하세요",
    "users_need": "{service:.1f}초 응답을 받고 {think:.0f}초 뒤에 다시 묻는 사용자 {users}명은 평균 {mean:.1f}건이 "
    "실행 중; 몰림을 감안해 표준편차 2배를 더하면 슬롯 {needed}개",
    "slots_suffice": "슬롯 {slots}개로 충분합니다 (필요 {needed}개).",
    "beyond_the_data": "슬롯 {needed}개가 필요하지만 {slots}개뿐입니다. 데이터는 평균 동시 {at_once:.1f}건일 때의 "
    "것이라 {needed}건에서도 같은 속도인지는 알 수 없습니다. gateway bench users로 먼저 측정하세요.",
    "learned_limit": "슬롯 {slots}개는 게이트웨이가 서버를 보고 학습한 값으로, max_concurrency와 관계없이 "
    "서버가 동시에 실행하는 수입니다. 대부분의 비전 모델처럼 Ollama가 하나씩 처리하는 모델은 "
    "OLLAMA_NUM_PARALLEL을 늘려도 그대로입니다.",
    "why_users": "사용자 수에 필요; 현재 {slots}",
    "why_parallel_users": "서버도 같은 수를 동시에 실행해야 함; 요청마다 컨텍스트 메모리가 필요",
    "why_seqs_users": "엔진의 동시 실행 수가 이보다 적으면 안 됨",
    # Cost
    "cost_month": "비용: 월 {monthly:,.0f} (사용 연수로 나눈 구입가와 24시간 전력)",
    "cost_user": "동시 사용자 {users}명 기준 1명당 월 {per_user:,.0f}",
    "cost_share": "같은 장비에서 동시 사용자 {before}명 → {users}명: 사용자당 비용은 이전의 {share:.0f} %",
    "no_share": "이전 결과와 비교할 수 없음: gateway bench users의 같은 기준으로 두 결과에 모두 나온 "
    "사용자 수가 없습니다.",
    "no_users": "사용자당 비용을 계산할 수 없음: 결과에 사용자 수가 없습니다. --users나 gateway bench users의 "
    "결과를 주세요.",
}
