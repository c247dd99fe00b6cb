//! Mistakes about which keys a query sees.

use fixtures::{AttentionCase, Mask, Sharding, Structure, sharding};
use tch::{TchError, Tensor};

use super::{Hypothesis, Reach};
use crate::diagnosis::evidence::Evidence;
use crate::diagnosis::mistake::Mistake;
use crate::diagnosis::prediction::Prediction;

pub(super) const HYPOTHESES: &[Hypothesis] = &[
    Hypothesis {
        mistake: Some(Mistake::MaskDroppedInEval),
        reach: Reach::Forward,
        applies: |case| case.extras.eval && is_masked(case),
        predict: |evidence| without(evidence, "Outside training no key is hidden.", unmasked),
    },
    Hypothesis {
        mistake: Some(Mistake::WindowIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.window.is_some(),
        predict: |evidence| {
            let window = evidence.case.extras.window.unwrap_or_default();
            let sentence = format!("The window of {window} tokens is ignored.");
            without(evidence, &sentence, |case| case.extras.window = None)
        },
    },
    Hypothesis {
        mistake: Some(Mistake::WindowOffByOne),
        reach: Reach::Forward,
        applies: |case| case.extras.window.is_some(),
        predict: window_off_by_one,
    },
    Hypothesis {
        mistake: Some(Mistake::DocumentsCutAtShards),
        reach: Reach::Forward,
        applies: |case| case.extras.documents.is_some() && case.world > 1 && !case.extras.eval,
        predict: documents_cut_at_shards,
    },
    Hypothesis {
        mistake: Some(Mistake::DocumentsIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.documents.is_some(),
        predict: |evidence| {
            let count = evidence.case.extras.documents.map_or(0, |d| d.count());
            let sentence = format!("The {count} documents of each sequence see one another.");
            without(evidence, &sentence, |case| case.extras.documents = None)
        },
    },
    Hypothesis {
        mistake: Some(Mistake::PaddingIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.padding.is_some(),
        predict: |evidence| {
            let sentence = "Padding tokens are seen as keys.";
            without(evidence, sentence, |case| case.extras.padding = None)
        },
    },
    Hypothesis {
        mistake: Some(Mistake::LayoutOfLocalHeads),
        reach: Reach::Forward,
        applies: |case| case.extras.block.is_some() && case.world > 1 && !case.extras.eval,
        predict: layout_of_local_heads,
    },
    Hypothesis {
        mistake: Some(Mistake::LayoutIgnored),
        reach: Reach::Forward,
        applies: |case| case.extras.block.is_some(),
        predict: |evidence| {
            let sentence = "The block layout is ignored.";
            without(evidence, sentence, |case| case.extras.block = None)
        },
    },
    Hypothesis {
        mistake: Some(Mistake::CausalIgnored),
        reach: Reach::Forward,
        applies: |case| case.mask == Mask::Causal,
        predict: |evidence| {
            let sentence = "Queries see the keys behind them: there is no causal mask.";
            without(evidence, sentence, |case| case.mask = Mask::Full)
        },
    },
    Hypothesis {
        mistake: Some(Mistake::CausalStrict),
        reach: Reach::Forward,
        applies: |case| case.mask == Mask::Causal,
        predict: causal_off_by_one,
    },
    Hypothesis {
        mistake: Some(Mistake::CausalByLocalIndex),
        reach: Reach::Forward,
        applies: |case| case.mask == Mask::Causal && case.world > 1 && !case.extras.eval,
        predict: causal_by_local_index,
    },
    Hypothesis {
        mistake: Some(Mistake::LocalTokensOnly),
        reach: Reach::Forward,
        applies: |case| case.world > 1 && !case.extras.eval && case.extras.cross.is_none(),
        predict: local_tokens_only,
    },
];

/// What has no name.
pub(super) const UNNAMED: &[Hypothesis] = &[Hypothesis {
    mistake: None,
    reach: Reach::Forward,
    applies: |case| case.mask == Mask::Full && case.extras.cross.is_none(),
    predict: |evidence| {
        let sentence =
            "Queries do not see the keys behind them: there is a causal mask, and none is due.";
        without(evidence, sentence, |case| case.mask = Mask::Causal)
    },
}];

fn is_masked(case: &AttentionCase) -> bool {
    case.mask == Mask::Causal
        || case.extras.window.is_some()
        || case.extras.documents.is_some()
        || case.extras.padding.is_some()
        || case.extras.block.is_some()
}

fn unmasked(case: &mut AttentionCase) {
    case.mask = Mask::Full;
    case.extras.window = None;
    case.extras.documents = None;
    case.extras.padding = None;
    case.extras.block = None;
}

/// What is seen where the case is so altered.
fn without(
    evidence: &Evidence<'_>,
    sentence: &str,
    alter: impl Fn(&mut AttentionCase),
) -> Result<Vec<Prediction>, TchError> {
    let mut case = evidence.case.clone();
    alter(&mut case);
    let structure = Structure::of(&case);
    let sees = |(batch, head): (usize, usize), query: usize, key: usize| {
        structure.sees(batch, head, query, key)
    };
    Ok(vec![seen(evidence, sentence, sees)?])
}

/// What attention answers whose queries see what `sees` says of batch and head,
/// query and key.
fn seen(
    evidence: &Evidence<'_>,
    sentence: &str,
    sees: impl Fn((usize, usize), usize, usize) -> bool,
) -> Result<Prediction, TchError> {
    let mut problem = evidence.problem()?;
    problem.visible = Some(visible(evidence.case, sees)?);
    evidence.solved(sentence, &problem)
}

/// `[batch, query heads, tokens, KV tokens]`, each of the first two 1 where
/// nothing differs by it.
pub(super) fn visible(
    case: &AttentionCase,
    sees: impl Fn((usize, usize), usize, usize) -> bool,
) -> Result<Tensor, TchError> {
    let extras = &case.extras;
    let differs_by_batch = extras.documents.is_some() || extras.padding.is_some();
    let batches = if differs_by_batch { case.batch } else { 1 };
    let heads = extras.block.map_or(1, |_| case.query_heads);
    let (queries, keys) = (case.sequence, case.kv_sequence());
    let mut seen = Vec::with_capacity(batches * heads * queries * keys);
    for place in (0..batches).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        for query in 0..queries {
            seen.extend((0..keys).map(|key| sees(place, query, key)));
        }
    }
    let shape = [batches, heads, queries, keys].map(|size| size as i64);
    Tensor::f_from_slice(&seen)?.f_view(shape)
}

fn window_off_by_one(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let window = evidence.case.extras.window.unwrap_or_default();
    let by = |alter: i64| {
        let sentence = format!(
            "The window of {window} tokens is one token too {}.",
            if alter > 0 { "wide" } else { "narrow" }
        );
        let altered = window.saturating_add_signed(alter as isize);
        without(evidence, &sentence, |case| {
            case.extras.window = Some(altered)
        })
    };
    let mut predictions = by(1)?;
    if window > 1 {
        predictions.extend(by(-1)?);
    }
    // On one side alone.
    let structure = [0, 1].map(|more| {
        let mut case = evidence.case.clone();
        case.extras.window = Some(window + more);
        Structure::of(&case)
    });
    for (side, is_side) in [
        (
            "backwards",
            (|query, key| key < query) as fn(usize, usize) -> bool,
        ),
        ("forwards", |query, key| key > query),
    ] {
        let sentence = format!("The window of {window} tokens is one token too wide {side}.");
        let sees = |(batch, head): (usize, usize), query: usize, key: usize| {
            structure[usize::from(is_side(query, key))].sees(batch, head, query, key)
        };
        predictions.push(seen(evidence, &sentence, sees)?);
    }
    Ok(predictions)
}

fn causal_off_by_one(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let mut full = evidence.case.clone();
    full.mask = Mask::Full;
    let structure = Structure::of(&full);
    let strict = |(batch, head): (usize, usize), query: usize, key: usize| {
        key < query && structure.sees(batch, head, query, key)
    };
    let loose = |(batch, head): (usize, usize), query: usize, key: usize| {
        key <= query + 1 && structure.sees(batch, head, query, key)
    };
    Ok(vec![
        seen(evidence, "Queries do not see their own token.", strict)?,
        seen(
            evidence,
            "Queries see one token behind them: the causal mask is off by one.",
            loose,
        )?,
    ])
}

/// The number that a token goes by.
type Number<'a> = &'a dyn Fn(usize) -> usize;

fn causal_by_local_index(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let mut full = evidence.case.clone();
    full.mask = Mask::Full;
    let window = full.extras.window.take();
    let structure = Structure::of(&full);
    let places = evidence.place_of_token();
    let local = |token: usize| places[token].1;
    let global = |token: usize| token;
    let ways: [(&str, Number, Number); 3] = [
        ("of queries and keys", &local, &local),
        ("of queries", &local, &global),
        ("of keys", &global, &local),
    ];
    let predict = |(whose, of_query, of_key): (&str, Number, Number)| {
        // A window counts in the same numbers.
        let sees = |(batch, head): (usize, usize), query: usize, key: usize| {
            let behind = of_query(query).checked_sub(of_key(key));
            behind.is_some_and(|behind| window.is_none_or(|window| behind < window))
                && structure.sees(batch, head, query, key)
        };
        let sentence = format!("The causal mask compares the numbers {whose} on their ranks.");
        seen(evidence, &sentence, sees)
    };
    ways.into_iter().map(predict).collect()
}

fn local_tokens_only(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let structure = Structure::of(evidence.case);
    let places = evidence.place_of_token();
    let sees = |(batch, head): (usize, usize), query: usize, key: usize| {
        places[query].0 == places[key].0 && structure.sees(batch, head, query, key)
    };
    let sentence = "Queries see only the tokens of their own rank.";
    Ok(vec![seen(evidence, sentence, sees)?])
}

fn documents_cut_at_shards(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let structure = Structure::of(evidence.case);
    let places = evidence.place_of_token();
    let cut = |(batch, head): (usize, usize), query: usize, key: usize| {
        places[query].0 == places[key].0 && structure.sees(batch, head, query, key)
    };
    // Runs of tokens that a rank holds side by side. The last rank's two runs
    // of a zigzag are neighbours.
    let chunks = match evidence.case.extras.sharding {
        Sharding::Zigzag => sharding::contiguous(evidence.case.sequence, 2 * evidence.ranks()),
        Sharding::Contiguous | Sharding::Striped => Vec::new(),
    };
    let mut run_of_token = vec![0; evidence.case.sequence];
    for token in 1..run_of_token.len() {
        let (before, own) = (places[token - 1], places[token]);
        let is_cut = chunks.iter().any(|chunk| chunk.start == token);
        let goes_on = own.0 == before.0 && own.1 == before.1 + 1 && !is_cut;
        run_of_token[token] = run_of_token[token - 1] + usize::from(!goes_on);
    }
    let cut_at_runs = |(batch, head): (usize, usize), query: usize, key: usize| {
        run_of_token[query] == run_of_token[key] && structure.sees(batch, head, query, key)
    };
    let mut joined = evidence.case.clone();
    joined.extras.documents = None;
    let without_documents = Structure::of(&joined);
    let shards_alone = |(batch, head): (usize, usize), query: usize, key: usize| {
        places[query].0 == places[key].0 && without_documents.sees(batch, head, query, key)
    };
    Ok(vec![
        seen(evidence, "Documents end where shards end.", cut)?,
        seen(
            evidence,
            "Documents end where runs of a rank's tokens end.",
            cut_at_runs,
        )?,
        seen(
            evidence,
            "Documents end where shards end, and nowhere else.",
            shards_alone,
        )?,
    ])
}

fn layout_of_local_heads(evidence: &Evidence<'_>) -> Result<Vec<Prediction>, TchError> {
    let mut problem = evidence.problem()?;
    let Some(visible) = &problem.visible else {
        return Ok(Vec::new());
    };
    let local = super::shared::local_heads(evidence);
    let local: Vec<i64> = local.into_iter().map(|head| head as i64).collect();
    problem.visible = Some(visible.f_index_select(1, &Tensor::f_from_slice(&local)?)?);
    let sentence = "Each rank uses the layouts of the first heads of all.";
    Ok(vec![evidence.solved(sentence, &problem)?])
}
