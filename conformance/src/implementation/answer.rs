//! How the bundled reference answers one case on one rank: the same on threads
//! and behind the exchange.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use fixtures::Feature;
use fixtures::exchange::{AnswerInfo, AnswerStatus, CaseInfo, Tensors, tensor};
use tch::Tensor;
use ulysses::{Communicator, CountingCommunicator, Kernel, Mask, Options, UlyssesAttention};

use crate::tensor::{from_array, kind, to_array};

/// What the reference claims: everything but ranks without a query head.
pub fn features() -> BTreeSet<String> {
    Feature::ALL
        .into_iter()
        .filter(|&feature| feature != Feature::FewerQueryHeadsThanRanks)
        .map(|feature| feature.name().to_owned())
        .collect()
}

/// Answers `case` with the reference. Whatever goes wrong is in the answer's
/// status and message.
pub fn answer(
    case: &CaseInfo,
    inputs: &Tensors,
    communicator: Arc<dyn Communicator>,
    kernel: Kernel,
) -> (AnswerInfo, Tensors) {
    let counting = Arc::new(CountingCommunicator::new(communicator));
    let start = Instant::now();
    let (status, message, tensors) = match attention(case, inputs, counting.clone(), kernel) {
        Ok(tensors) => (AnswerStatus::Ok, String::new(), tensors),
        Err(message) => (AnswerStatus::Error, message, Tensors::new()),
    };
    let info = AnswerInfo {
        status,
        message,
        elapsed_s: start.elapsed().as_secs_f64(),
        peak_memory_bytes: None,
        bytes_sent: Some(counting.traffic().off_rank_bytes),
    };
    (info, tensors)
}

fn attention(
    case: &CaseInfo,
    inputs: &Tensors,
    communicator: Arc<CountingCommunicator>,
    kernel: Kernel,
) -> Result<Tensors, String> {
    let said = |error: tch::TchError| error.to_string();
    let input = |name| from_array(tensor(inputs, name)?).map_err(said);
    let leaf = |name| input(name)?.f_set_requires_grad(true).map_err(said);
    let (q, k, v, dout) = (leaf("q")?, leaf("k")?, leaf("v")?, input("dout")?);
    let mask = match case.mask.as_str() {
        "full" => Mask::Full,
        "causal" => Mask::Causal,
        other => return Err(format!("`mask` is `{other}`; it is `full` or `causal`")),
    };
    let options = Options {
        kernel,
        mask,
        uneven_heads: true,
        ..Options::default()
    };
    let attention = UlyssesAttention::new(communicator, options);
    let out = attention
        .forward(&q, &k, &v)
        .map_err(|error| error.to_string())?;
    // Backward of the sum of products gives `out` the cotangent dO, exactly.
    out.f_mul(&dout)
        .and_then(|products| products.f_sum(kind(case.dtype)))
        .and_then(|sum| sum.f_backward())
        .map_err(said)?;
    let named = |name: &str, tensor: &Tensor| {
        let array = to_array(tensor, case.dtype).map_err(said)?;
        Ok((name.to_owned(), array))
    };
    let gradient = |name, leaf: &Tensor| named(name, &leaf.f_grad().map_err(said)?);
    [
        named("out", &out.f_detach().map_err(said)?),
        gradient("dq", &q),
        gradient("dk", &k),
        gradient("dv", &v),
    ]
    .into_iter()
    .collect()
}
