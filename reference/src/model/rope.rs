//! How positions become angles in a decoder.
//!
//! Source of the scaling: Grattafiori et al., "The Llama 3 Herd of Models",
//! arXiv:2407.21783, and `rope_type` "llama3" of Hugging Face transformers.

use crate::{
    error::{Result, refuse},
    rotary::frequencies,
};
use std::f64::consts::TAU;
use tch::{Kind, Tensor};

/// The frequencies of a rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Channel pair c of heads of size D has the frequency `theta^(-2c/D)`, in
    /// radians per position, before any scaling.
    pub theta: f64,
    /// Makes low frequencies lower, for sequences longer than those of
    /// pretraining.
    pub scaling: Option<Llama3Scaling>,
}

/// With L positions in pretraining and a pair that turns n times in L: where
/// n is below `low_freq_factor` the frequency is divided by `factor`, above
/// `high_freq_factor` it is left alone, and in between it is interpolated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// What the low frequencies are divided by.
    pub factor: f64,
    /// Turns in L below which a frequency is low.
    pub low_freq_factor: f64,
    /// Turns in L above which a frequency is high.
    pub high_freq_factor: f64,
    /// L.
    pub original_max_position_embeddings: f64,
}

impl Rope {
    /// # Errors
    /// A refusal of the first number that is out of its range.
    pub(super) fn check(&self) -> Result<()> {
        positive("rope_theta", self.theta)?;
        let Some(scaling) = self.scaling else {
            return Ok(());
        };
        positive("factor", scaling.factor)?;
        positive("low_freq_factor", scaling.low_freq_factor)?;
        positive("high_freq_factor", scaling.high_freq_factor)?;
        positive(
            "original_max_position_embeddings",
            scaling.original_max_position_embeddings,
        )?;
        if scaling.high_freq_factor > scaling.low_freq_factor {
            return Ok(());
        }
        refuse(
            "high_freq_factor",
            format!("is {}", scaling.high_freq_factor),
            format!(
                "give more than `low_freq_factor`, {}",
                scaling.low_freq_factor
            ),
        )
    }

    /// The angle of each token and channel pair of heads of size `head_dim`,
    /// float64 [B, s, 1, D/2], from positions [B, s].
    pub(super) fn angles(&self, position_ids: &Tensor, head_dim: usize) -> Result<Tensor> {
        let mut frequencies = frequencies(self.theta, (head_dim / 2) as i64);
        if let Some(scaling) = self.scaling {
            for frequency in &mut frequencies {
                *frequency = scaling.of(*frequency);
            }
        }
        let frequencies = Tensor::f_from_slice(&frequencies)?.f_to_device(position_ids.device())?;
        let positions = position_ids.f_to_kind(Kind::Double)?;
        let positions = positions.f_unsqueeze(-1)?.f_unsqueeze(-1)?;
        Ok(positions.f_mul(&frequencies)?)
    }
}

impl Llama3Scaling {
    fn of(&self, frequency: f64) -> f64 {
        let turns = self.original_max_position_embeddings * frequency / TAU;
        let width = self.high_freq_factor - self.low_freq_factor;
        let kept = ((turns - self.low_freq_factor) / width).clamp(0.0, 1.0);
        (1.0 - kept) * frequency / self.factor + kept * frequency
    }
}

fn positive(name: &'static str, number: f64) -> Result<()> {
    if number.is_finite() && number > 0.0 {
        return Ok(());
    }
    refuse(name, format!("is {number}"), "give a positive number")
}
