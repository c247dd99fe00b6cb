//! Faults of what attention computes.

use fixtures::{AttentionCase, Mask};

use super::{Fault, Made, is_split, plain};
use crate::diagnosis::Mistake;

const TRANSFORMERS_SDPA: Option<&str> =
    Some("DeepSpeed 0.19.8, UlyssesSPAttentionHF around SDPA: the wrapper drops the mask");

pub(super) const FAULTS: &[Fault] = &[
    Fault {
        name: "causal-ignored",
        mistake: Mistake::CausalIgnored,
        effect: "The model sees the tokens that it is to predict.",
        source: None,
        // Outside training alone it is a mistake of the bypass.
        made: Made::InAttention {
            applies: |case| is_good(case) && case.mask == Mask::Causal && !case.extras.eval,
            make: |stages| {
                stages.local = |_, _, local| {
                    local.score.mask = ulysses::Mask::Full;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "causal-strict",
        mistake: Mistake::CausalStrict,
        effect: "No token sees itself, and the first sees nothing.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.mask == Mask::Causal && is_plain(case),
            make: |stages| {
                stages.local = |_, _, local| {
                    let behind = plain::between(&plain::global_numbers(local)?)?;
                    let visible = plain::visible(local)?.f_logical_and(&behind.f_gt(0)?)?;
                    local.visible = Some(visible);
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "local-tokens-only",
        mistake: Mistake::LocalTokensOnly,
        effect: "Nothing is exchanged, and every rank attends to its own tokens.",
        source: None,
        // Ends of documents are those of the whole sequence.
        made: Made::InAttention {
            applies: |case| is_split(case) && is_plain(case) && case.extras.documents.is_none(),
            make: |stages| {
                stages.asked = |_, asked| {
                    asked.is_alone = true;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "scale-missing",
        mistake: Mistake::ScaleMissing,
        effect: "Attention is far sharper than it should be.",
        source: None,
        made: Made::InAttention {
            applies: is_good,
            make: |stages| {
                stages.local = |_, _, local| {
                    local.score.scale = Some(1.0);
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "scale-by-hidden",
        mistake: Mistake::ScaleByHidden,
        effect: "Attention is flatter than it should be.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.scale.is_none(),
            make: |stages| {
                stages.local = |at, _, local| {
                    let hidden = at.info.query_heads * at.info.head_size;
                    local.score.scale = Some(1.0 / (hidden as f64).sqrt());
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "scale-ignored",
        mistake: Mistake::ScaleIgnored,
        effect: "Models with a scale of their own get another attention.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.scale.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.score.scale = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "window-ignored",
        mistake: Mistake::WindowIgnored,
        effect: "A model with a sliding window attends to everything.",
        source: TRANSFORMERS_SDPA,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.window.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.score.window = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "window-off-by-one",
        mistake: Mistake::WindowOffByOne,
        effect: "Every token sees one token more than it should.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.window.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.score.window = local.score.window.map(|window| window + 1);
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "documents-ignored",
        mistake: Mistake::DocumentsIgnored,
        effect: "Packed documents attend to one another, and the loss spikes.",
        source: Some("DeepSpeed 0.19.8 around SDPA; axolotl #1375; LlamaFactory PR #7338"),
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.documents.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.documents = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "padding-ignored",
        mistake: Mistake::PaddingIgnored,
        effect: "Real tokens attend to padding.",
        source: TRANSFORMERS_SDPA,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.padding.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.real = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "softcap-ignored",
        mistake: Mistake::SoftcapIgnored,
        effect: "Models with capped scores get sharper attention.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.softcap.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.score.softcap = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "sinks-ignored",
        mistake: Mistake::SinksIgnored,
        effect: "Weights add up to one where they should not, and sinks have no gradient.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.sinks,
            make: |stages| {
                stages.local = |_, _, local| {
                    local.sinks = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "slopes-ignored",
        mistake: Mistake::SlopesIgnored,
        effect: "A model that knows positions by ALiBi alone knows none.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.alibi,
            make: |stages| {
                stages.local = |_, _, local| {
                    local.slopes = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "layout-ignored",
        mistake: Mistake::LayoutIgnored,
        effect: "Sparse attention is dense.",
        source: Some(
            "DeepSpeed 0.19.8, UlyssesSPAttentionHF: a BlockMask is replaced by a causal one",
        ),
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.block.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.layout = None;
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "mask-dropped-in-eval",
        mistake: Mistake::MaskDroppedInEval,
        effect: "Evaluation sees padding and tokens that are still to come, training does not.",
        source: Some("DeepSpeed 0.19.8, ulysses_sp.py: the mask is dropped before the bypass"),
        made: Made::InAttention {
            applies: |case| case.extras.eval,
            make: |stages| {
                stages.local = |at, _, local| {
                    if !at.info.training {
                        local.score.mask = ulysses::Mask::Full;
                        local.score.window = None;
                        (local.real, local.documents, local.layout) = (None, None, None);
                    }
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "dropout-shared",
        mistake: Mistake::DropoutShared,
        effect: "Heads of different ranks drop the same weights, which are then no independent \
                 draws.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_split(case) && case.extras.dropout.is_some(),
            make: |stages| {
                stages.local = |_, _, local| {
                    local.dropout = local.dropout.map(|mut dropout| {
                        dropout.first_head = 0;
                        dropout
                    });
                    Ok(())
                };
            },
        },
    },
    Fault {
        name: "dropout-not-rescaled",
        mistake: Mistake::DropoutNotRescaled,
        effect: "Outputs are smaller in training than outside it.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.dropout.is_some(),
            make: |stages| {
                stages.attended = |at, output| {
                    let kept = 1.0 - at.info.dropout.unwrap_or_default();
                    Ok(output.f_mul_scalar(kept)?)
                };
            },
        },
    },
    Fault {
        name: "norms-ignored",
        mistake: Mistake::NormsIgnored,
        effect: "Models with normalised queries and keys get another attention.",
        source: None,
        made: Made::InAttention {
            applies: |case| is_good(case) && case.extras.norms,
            make: |stages| {
                stages.local = |_, _, local| {
                    local.norms = None;
                    Ok(())
                };
            },
        },
    },
];

/// Whether it is a good question that is asked once, on any number of ranks.
fn is_good(case: &AttentionCase) -> bool {
    case.extras.defect.is_none() && case.extras.state.is_none()
}

/// Whether the plain formula does it.
fn is_plain(case: &AttentionCase) -> bool {
    case.extras.block.is_none() && case.extras.dropout.is_none()
}
