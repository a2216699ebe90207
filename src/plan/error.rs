//! Errors of tracing and planning a network.

use crate::device;

/// A network that cannot be traced or planned.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Two parameters of one name.
    #[error("two parameters are named `{name}`")]
    DuplicateParameter {
        /// The name.
        name: String,
    },
    /// An operation that does not fit its inputs.
    #[error("{operation}: {reason}")]
    Shape {
        /// The operation's or its parameter's name.
        operation: String,
        /// What does not fit.
        reason: String,
    },
    /// A parameter on which the loss does not depend: its gradient would silently be missing.
    #[error("the loss does not depend on `{parameter}`: it would have no gradient")]
    NoGradient {
        /// The parameter's name.
        parameter: String,
    },
    /// An error of the device, such as too little memory.
    #[error(transparent)]
    Device(#[from] device::Error),
}
