"""Whom to cite: the papers that a run rests on, as BibTeX."""

from __future__ import annotations

from alignkit.errors import refuse_unknown

_DPO = """@inproceedings{rafailov2023direct,
  title = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Manning, Christopher D. and
            Ermon, Stefano and Finn, Chelsea},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2023},
  eprint = {2305.18290},
  archivePrefix = {arXiv}
}"""

_DIFFUSION_DPO = """@inproceedings{wallace2024diffusion,
  title = {Diffusion Model Alignment Using Direct Preference Optimization},
  author = {Wallace, Bram and Dang, Meihua and Rafailov, Rafael and Zhou, Linqi and Lou, Aaron and
            Purushwalkam, Senthil and Ermon, Stefano and Xiong, Caiming and Joty, Shafiq and
            Naik, Nikhil},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2024},
  eprint = {2311.12908},
  archivePrefix = {arXiv}
}"""

_IPO = """@inproceedings{azar2024general,
  title = {A General Theoretical Paradigm to Understand Learning from Human Preferences},
  author = {Gheshlaghi Azar, Mohammad and Guo, Zhaohan Daniel and Piot, Bilal and Munos, R{\\'e}mi
            and Rowland, Mark and Valko, Michal and Calandriello, Daniele},
  booktitle = {International Conference on Artificial Intelligence and Statistics},
  year = {2024},
  eprint = {2310.12036},
  archivePrefix = {arXiv}
}"""

_SLIC = """@misc{zhao2023slic,
  title = {{SLiC-HF}: Sequence Likelihood Calibration with Human Feedback},
  author = {Zhao, Yao and Joshi, Rishabh and Liu, Tianqi and Khalman, Misha and Saleh, Mohammad and
            Liu, Peter J.},
  year = {2023},
  eprint = {2305.10425},
  archivePrefix = {arXiv}
}"""

_RSO = """@inproceedings{liu2024statistical,
  title = {Statistical Rejection Sampling Improves Preference Optimization},
  author = {Liu, Tianqi and Zhao, Yao and Joshi, Rishabh and Khalman, Misha and Saleh, Mohammad and
            Liu, Peter J. and Liu, Jialu},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2309.06657},
  archivePrefix = {arXiv}
}"""

_ROBUST = """@inproceedings{chowdhury2024provably,
  title = {Provably Robust {DPO}: Aligning Language Models with Noisy Feedback},
  author = {Ray Chowdhury, Sayak and Kini, Anush and Natarajan, Nagarajan},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  eprint = {2403.00409},
  archivePrefix = {arXiv}
}"""

_LORA = """@inproceedings{hu2022lora,
  title = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi
            and Wang, Shean and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year = {2022},
  eprint = {2106.09685},
  archivePrefix = {arXiv}
}"""

_DORA = """@inproceedings{liu2024dora,
  title = {{DoRA}: Weight-Decomposed Low-Rank Adaptation},
  author = {Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and
            Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and Chen, Min-Hung},
  booktitle = {International Conference on Machine Learning},
  year = {2024},
  eprint = {2402.09353},
  archivePrefix = {arXiv}
}"""

_RSLORA = """@misc{kalajdzievski2023rank,
  title = {A Rank Stabilization Scaling Factor for Fine-Tuning with {LoRA}},
  author = {Kalajdzievski, Damjan},
  year = {2023},
  eprint = {2312.03732},
  archivePrefix = {arXiv}
}"""

_SDXL = """@inproceedings{podell2024sdxl,
  title = {{SDXL}: Improving Latent Diffusion Models for High-Resolution Image Synthesis},
  author = {Podell, Dustin and English, Zion and Lacey, Kyle and Blattmann, Andreas and
            Dockhorn, Tim and M{\\"u}ller, Jonas and Penna, Joe and Rombach, Robin},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2307.01952},
  archivePrefix = {arXiv}
}"""

_METHODS = {"dpo": {"text": (_DPO,), "image": (_DPO, _DIFFUSION_DPO, _SDXL)}}
_LOSSES = {"sigmoid": (), "robust": (_ROBUST,), "hinge": (_SLIC, _RSO), "ipo": (_IPO,)}
_ADAPTERS = {"lora": (_LORA,), "dora": (_LORA, _DORA), "rslora": (_LORA, _RSLORA)}


def citations(
    method_name: str,
    loss_name: str | None = None,
    modality: str = "text",
    adapter: str | None = None,
) -> list[str]:
    """BibTeX entries of the papers that a run rests on, the method first.

    Args:
        method_name: a name of `alignkit.methods()`, such as "dpo".
        loss_name: a name of `alignkit.losses.PREFERENCE_LOSSES`; None for a loss of your own, whose
            paper only you know.
        modality: "text" or "image".
        adapter: the `kind` of the `LoRA` that was trained; None if all weights were.
    """
    refuse_unknown("method", method_name, _METHODS)
    refuse_unknown("modality", modality, _METHODS[method_name])
    entries = [*_METHODS[method_name][modality]]
    if loss_name is not None:
        refuse_unknown("loss", loss_name, _LOSSES)
        entries += _LOSSES[loss_name]
    if adapter is not None:
        refuse_unknown("adapter kind", adapter, _ADAPTERS)
        entries += _ADAPTERS[adapter]
    return entries
