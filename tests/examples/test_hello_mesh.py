"""``hello_mesh.py``, twice."""

from __future__ import annotations


def test_two_processes_find_each_other_and_print_the_sum(processes, mesh_name):
    ended = processes.run_together([["examples/hello_mesh.py", mesh_name]] * 2)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert sorted(one.out for one in ended) == [
        f"rank {rank} of 2: the sum over all ranks is [3. 3. 3. 3.]\n" for rank in range(2)
    ]
