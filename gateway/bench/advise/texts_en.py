"""Texts of `gateway advise` in English; `texts_ko.py` has the same keys and figures."""

TEXTS = {
    "measured": "measured",
    "computed": "computed",
    "assumed": "assumption",
    "setting": "setting",
    "value": "value",
    "backend": "backend",
    "origin": "origin",
    "why": "why",
    "nothing": "The data carry no recommendation.",
    "met": "The target is met with these limits.",
    "not_met": "The target is not met.",
    # A benchmark
    "level": "{at_once} at once: {rate:.2f} requests/s, {tokens:.1f} tokens/s, median latency {latency:.2f} "
    "s, {failed} of {requests} failed{values}",
    "level_too_few": "{at_once} at once: {rate:.2f} requests/s, {tokens:.1f} tokens/s, median latency {latency:.2f} "
    "s, {failed} of {requests} failed{values} (too few requests for the percentile: the slowest one "
    "counts)",
    "too_few_levels": "The result has {levels} level(s) of requests at once; limits need at least two: gateway bench "
    "users, or gateway bench concurrency --levels 1,2,4,8.",
    "saturated": "Saturation: from {at_once} at once on the throughput stays at {rate:.2f} requests/s "
    "({tokens:.1f} tokens/s); more at once only take longer.",
    "not_saturated": "No saturation: the throughput still grows at {at_once} at once, so the data do not carry a "
    "statement on what the server does at most.",
    "serial": "The server answers one request after the other: {at_once} at once are no faster than one.",
    "met_up_to": "{targets}: met up to {at_once} at once.",
    "never_met": "{targets}: not met even with {at_once} at once. No limit helps; it takes a smaller model, "
    "shorter answers, or faster hardware.",
    "why_level": "the measured level that was chosen: {rate:.2f} requests/s at {at_once} at once",
    "why_parallel": "the server has to run as many at once; each takes memory for its own context",
    "why_seqs": "the engine must not run fewer at once",
    "why_queue": "patience × rate: {patience:.1f} s × {rate:.2f}/s; later ones would wait longer than that",
    "why_timeout": "after {patience:.1f} s in the queue the target is missed for certain",
    "users_fit": "{users} users at once: each has a slot of {slots}.",
    "users_queue": "{users} users at once: {slots} run, the others queue; the last waits {last:.1f} s of "
    "{patience:.1f} s.",
    "users_too_many": "{users} users at once: {slots} run, and the last would wait {last:.1f} s, more than "
    "{patience:.1f} s; it takes {servers} such servers.",
    # Metrics
    "too_few_requests": "{requests:.0f} requests are too few for a statement; it takes {needed}.",
    "little": "Little's law: {rate:.3f} requests/s × {service:.2f} s at the backend = {at_once:.2f} at once on "
    "average ({requests:.0f} requests in {period:.0f} s)",
    "slots": "{slots} slots by the settings, {share:.0f} % used on average; mean wait {wait:.2f} s",
    "slots_learned": "{slots} slots, as the gateway learned; {share:.0f} % used on average; mean wait {wait:.2f} s",
    "long_period": "These are averages over {hours:.0f} h and hide the busy hours: use --seconds in one of them, or "
    "record the traffic and replay it.",
    "mixed": "{share:.0f} % of the requests have images and wait {wait:.2f} s on average in a lane of their own; the "
    "service time is that of both together.",
    "rejected": "refused: {reasons}",
    "full": "{share:.0f} % of the slots are in use on average. Above {full:.0f} % the queue grows with every burst.",
    "target_met": "{target}: met, it is {value:.0f}",
    "target_missed": "{target}: missed, it is {value:.0f}",
    "no_figure": "{target}: the gateway's metrics do not have it; measure it with gateway bench",
    "users_need": "{users} users who ask again {think:.0f} s after an answer of {service:.1f} s have {mean:.1f} "
    "requests running on average; with two standard deviations for bursts {needed} slots",
    "slots_suffice": "{slots} slots are enough, {needed} are needed.",
    "beyond_the_data": "{needed} slots are needed and there are {slots}. The data show the backend with {at_once:.1f} "
    "at once on average, not whether it is as fast with {needed}: measure with gateway bench users "
    "before you rely on it.",
    "learned_limit": "The gateway learned {slots} by watching the server, which runs no more at once whatever "
    "max_concurrency says. Models that an Ollama runs one at a time, such as most with vision, stay so "
    "with any OLLAMA_NUM_PARALLEL.",
    "why_users": "for the users; {slots} now",
    "why_parallel_users": "the server has to run as many at once; each takes memory for its own context",
    "why_seqs_users": "the engine must not run fewer at once",
    # Cost
    "cost_month": "Cost: {monthly:,.0f} a month (price over its years of use, and power around the clock)",
    "cost_user": "{per_user:,.0f} a month for each of {users} users at once",
    "cost_share": "{share:.0f} % of the cost per user before, with {before} users at once then and {users} now on "
    "the same machine",
    "no_share": "No comparison with the result before: no criterion of gateway bench users has a number in both.",
    "no_users": "No cost per user: the result does not say how many users are served; pass --users, or a result "
    "of gateway bench users.",
}
