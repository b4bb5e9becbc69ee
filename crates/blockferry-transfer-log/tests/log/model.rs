//! What the stories are checked against: the promises that were made, and what must hold after them.

/// What was promised, or begun, before a crash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Promise {
    /// The target may move to this image from now on, by this session.
    Heading(usize, u8),
    /// The decision to move was on its way.
    Deciding,
    /// The target is at this image.
    At(usize),
    /// So much is durable: sequence, and bytes staged.
    Acknowledged(u64, u64),
    Cancelling,
    Cancelled,
    Accepting,
    Accepted,
    Adopting,
    Adopted,
    /// The image the target is at is kept from now on.
    Anchored,
}

/// What the model knows after a list of promises.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) at: usize,
    pub(crate) heading: Option<(usize, u8)>,
    pub(crate) deciding: bool,
    pub(crate) acknowledged: Option<(u64, u64)>,
    pub(crate) cancelling: bool,
    /// Given up by name and not whole again.
    pub(crate) given_up: bool,
    /// The image before, while there is a way back.
    pub(crate) way_back: Option<usize>,
    /// The image that is kept through all sessions.
    pub(crate) anchor: Option<usize>,
}

impl Model {
    pub(crate) fn after(promises: &[Promise]) -> Self {
        let mut model = Self {
            at: 0,
            heading: None,
            deciding: false,
            acknowledged: None,
            cancelling: false,
            given_up: false,
            way_back: None,
            anchor: None,
        };
        promises.iter().for_each(|p| model.take(p));
        model
    }

    pub(crate) fn take(&mut self, promise: &Promise) {
        match promise {
            Promise::Heading(image, session) => {
                if self.heading.is_some_and(|(before, _)| before != *image) {
                    // In a working file, what was acknowledged may be overwritten with something else now.
                    self.acknowledged = self.acknowledged.map(|(sequence, _)| (sequence, 0));
                }
                self.heading = Some((*image, *session));
            }
            Promise::Deciding => self.deciding = true,
            Promise::At(image) => {
                let back = self.heading.is_some_and(|(_, session)| session == 0);
                self.way_back = Some(self.at).filter(|_| !back);
                self.given_up = false;
                self.at = *image;
                self.settle();
            }
            Promise::Acknowledged(sequence, bytes) => {
                self.acknowledged = Some((*sequence, *bytes));
            }
            Promise::Cancelling => self.cancelling = true,
            Promise::Cancelled => {
                self.given_up = true;
                self.settle();
            }
            Promise::Accepting | Promise::Adopting => {}
            Promise::Accepted | Promise::Adopted => self.way_back = None,
            Promise::Anchored => self.anchor = Some(self.at),
        }
    }

    fn settle(&mut self) {
        self.heading = None;
        self.deciding = false;
        self.acknowledged = None;
        self.cancelling = false;
    }
}

/// Says what does not hold.
macro_rules! check {
    ($holds:expr, $($text:tt)+) => {
        if !$holds {
            return Err(format!($($text)+));
        }
    };
}
pub(crate) use check;
