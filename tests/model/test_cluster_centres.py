import torch

from stagesweep.model.cluster_centres import StudentTAssignment


def test_assignment_is_the_student_t_of_the_paper() -> None:
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(7, 3, generator=g)
    clusters = StudentTAssignment(4, 3)
    # q_ij ~ (1 + |z_i - mu_j|^2 / alpha)^(-(alpha + 1) / 2), alpha = 1, entry by entry
    expected = torch.empty(7, 4)
    for i in range(7):
        for j in range(4):
            expected[i, j] = 1 / (1 + (mean[i] - clusters.centres[j]).norm() ** 2)
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(clusters(mean), expected)


def test_order_of_centres_is_order_of_columns() -> None:
    mean, clusters = torch.randn(5, 3), StudentTAssignment(4, 3)
    before = clusters(mean)
    clusters.set_centres(clusters.centres[[2, 0, 3, 1]])
    torch.testing.assert_close(clusters(mean), before[:, [2, 0, 3, 1]])


def test_number_of_centres_follows_set_centres_and_loaded_weights() -> None:
    clusters = StudentTAssignment(12, 3)
    given = torch.randn(5, 3)
    clusters.set_centres(given)
    assert torch.equal(clusters.centres, given)
    assert clusters.centres.requires_grad
    given += 1  # a copy was taken
    assert not torch.equal(clusters.centres, given)

    parent = torch.nn.Module()
    parent.clusters = StudentTAssignment(12, 3)
    parent.load_state_dict({"clusters.centres": clusters.centres.detach()})
    assert torch.equal(parent.clusters.centres, clusters.centres)
    assert isinstance(parent.clusters.centres, torch.nn.Parameter)
