"""Selection of variable genes, against scanpy."""

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from stagesweep.systems.singlecell.data.genes import pearson_residual_variance
from stagesweep.systems.singlecell.data.h5ad import CountTable

# scanpy 1.11.5, experimental.pp.highly_variable_genes(flavor="pearson_residuals") of the counts
# below: `residual_variances`.
SCANPY = [
    2.6281889075290974,
    1.288353840061462,
    2.7707512253332114,
    2.465114857480731,
    2.835889298804662,
    1.675908183903665,
]


def test_the_variance_of_pearson_residuals_is_that_of_scanpy() -> None:
    i, j = np.indices((40, 6))
    counts = ((i * 7 + j * j * 3) % (2 * j + 3) * (i % (j + 1) == 0)).astype(np.float32)
    cells = CountTable("t", list("abcdef"), pd.DataFrame(index=range(40)), csr_matrix(counts))
    found = pearson_residual_variance(cells, np.arange(40), np.arange(6), seed=0)
    np.testing.assert_allclose(found, SCANPY, rtol=1e-6)
