"""Secure sums with drop-outs and discrete noise: a server learns the sum of clients' vectors, and nothing else.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017;
Kairouz, Liu and Steinke, The Distributed Discrete Gaussian Mechanism, ICML 2021; Canonne, Kamath
and Steinke, NeurIPS 2020.

    setup = plan_sum(session=secrets.token_hex(16), clients=10, dimension=512, clip=1.0, noise_multiplier=2.0)
    result, traffic = local_sum(setup, vectors, dropped={"mask": [3]})      # vectors [10, 512]
    result.values, result.survivors, setup.charge(result.survivors)
"""
