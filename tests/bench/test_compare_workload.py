from gateway.bench.compare_workload import differences

WORKLOAD = {"requests": 16, "requests_sha256": "aa", "max_concurrency": 4, "request_rate": None, "seed": 0}


def test_equal_workloads_do_not_differ_whatever_the_side_is() -> None:
    assert differences({**WORKLOAD, "model": "x", "url": "u"}, {**WORKLOAD, "model": "y", "seed": 0.0}) == []


def test_each_differing_field_is_named_with_both_values_and_digests_last() -> None:
    other = {**WORKLOAD, "max_concurrency": 8, "requests_sha256": "bb", "request_rate": 2.5}
    found = [str(one) for one in differences(WORKLOAD, other)]
    assert found == [
        "max_concurrency: 4 in A, 8 in B",
        "request_rate: – in A, 2.5 in B",
        "requests_sha256: aa in A, bb in B",
    ]


def test_a_field_that_one_side_did_not_record_differs() -> None:
    assert [one.field for one in differences(WORKLOAD, {**WORKLOAD, "output_len": 128})] == ["output_len"]
