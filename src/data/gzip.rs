//! Files that are compressed with gzip.

use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;

/// The first bytes of a gzip file.
pub(super) const START: [u8; 2] = [0x1f, 0x8b];

/// The contents of a gzip file: of all its members, one after another. Zeros may follow the last one, as on tapes and
/// after some downloads.
pub(super) struct Members<R: BufRead> {
    /// None after the last member.
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> Members<R> {
    pub fn new(file: R) -> Self {
        Self { member: Some(GzDecoder::new(file)) }
    }
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let bytes = member.read(into)?;
            if bytes > 0 || into.is_empty() {
                return Ok(bytes);
            }
            let Some(mut rest) = self.member.take().map(GzDecoder::into_inner) else { break };
            match rest.fill_buf()?.first() {
                None => {}
                Some(&first) if first == START[0] => self.member = Some(GzDecoder::new(rest)),
                Some(_) => only_zeros(rest)?,
            }
        }
        Ok(0)
    }
}

fn only_zeros(mut rest: impl BufRead) -> io::Result<()> {
    loop {
        let part = rest.fill_buf()?;
        if part.iter().any(|&byte| byte != 0) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "bytes after its end"));
        }
        match part.len() {
            0 => return Ok(()),
            length => rest.consume(length),
        }
    }
}
