//! A drawing: a list of shapes and labels, and how it is written as SVG for the page or for paper.

use std::fmt::Write;

use super::font::Font;

/// Colours of series, after Okabe and Ito, darker where they would be faint on white.
pub(super) const SERIES: [[u8; 3]; 7] =
    [[0, 114, 178], [213, 94, 0], [0, 158, 115], [184, 92, 144], [168, 111, 0], [45, 138, 198], [90, 90, 90]];
/// The colours of series on a dark page.
pub(super) const SERIES_ON_DARK: [[u8; 3]; 7] =
    [[86, 168, 224], [255, 138, 61], [44, 199, 154], [227, 155, 196], [240, 180, 41], [140, 203, 245], [187, 187, 187]];

/// A colour. The numbers are opacities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Ink {
    /// The colour of text.
    Text(f64),
    /// The colour of the series of this index.
    Series(usize, f64),
    /// This colour.
    Colour([u8; 3], f64),
}

impl Ink {
    pub fn opacity(self) -> f64 {
        let (Ink::Text(opacity) | Ink::Series(_, opacity) | Ink::Colour(_, opacity)) = self;
        opacity
    }

    /// The colour on paper, where text is black.
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Ink::Text(_) => [0, 0, 0],
            Ink::Series(series, _) => SERIES[series % SERIES.len()],
            Ink::Colour(colour, _) => colour,
        }
    }

    fn css(self, medium: Medium<'_>) -> String {
        match (self, medium) {
            (Ink::Text(_), Medium::Page) => "currentColor".into(),
            (Ink::Series(series, _), Medium::Page) => format!("var(--series-{})", series % SERIES.len()),
            _ => hex(self.rgb()),
        }
    }
}

/// The colour in CSS.
pub(super) fn hex([r, g, b]: [u8; 3]) -> String {
    format!("#{r:02x}{g:02x}{b:02x}")
}

/// How a drawing is put on paper.
pub(super) struct Sheet {
    pub font: Font,
    /// Pixels of CSS, which are 1/96 inch, per unit of the drawing.
    pub scale: f64,
    /// Pixels of a PNG per inch.
    pub dpi: f64,
    /// No white behind the drawing.
    pub transparent: bool,
}

impl Sheet {
    /// Millimetres per pixel of CSS.
    pub const MILLIMETRES: f64 = 25.4 / 96.0;
}

/// Where an SVG is shown.
#[derive(Clone, Copy)]
pub(super) enum Medium<'a> {
    /// Inside the page, in the colours of the page.
    Page,
    /// In its own file.
    Paper(&'a Sheet),
}

/// Lines through points, filled or stroked.
#[derive(Debug, Clone, Default)]
pub(super) struct VectorPath {
    pub paths: Vec<Vec<[f64; 2]>>,
    pub closed: bool,
    pub fill: Option<Ink>,
    /// Ink and width of the stroke.
    pub stroke: Option<(Ink, f64)>,
    /// Lengths of dashes and gaps in turn; empty for a solid line.
    pub dash: &'static [f64],
    /// The tooltip.
    pub tip: Option<String>,
}

/// The anchor of a label.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

#[derive(Debug, Clone)]
pub(super) struct Label {
    pub at: [f64; 2],
    pub text: String,
    pub size: f64,
    pub anchor: Anchor,
    pub ink: Ink,
    /// Rotated: read from bottom to top.
    pub vertical: bool,
}

#[derive(Debug, Clone)]
pub(super) enum Mark {
    Shape(VectorPath),
    Label(Label),
}

/// Shapes and labels. Later ones are drawn over earlier ones.
#[derive(Debug, Clone)]
pub(super) struct Drawing {
    pub width: f64,
    pub height: f64,
    /// A description for screen readers.
    pub title: String,
    pub marks: Vec<Mark>,
}

impl Drawing {
    pub fn new(width: f64, height: f64, title: impl Into<String>) -> Self {
        Self { width, height, title: title.into(), marks: Vec::new() }
    }

    pub fn shape(&mut self, shape: VectorPath) {
        if shape.paths.iter().any(|path| !path.is_empty()) {
            self.marks.push(Mark::Shape(shape));
        }
    }

    pub fn line(&mut self, points: Vec<[f64; 2]>, ink: Ink, width: f64) {
        self.shape(VectorPath { paths: vec![points], stroke: Some((ink, width)), ..VectorPath::default() });
    }

    pub fn polygon(&mut self, points: Vec<[f64; 2]>, fill: Ink) {
        self.shape(VectorPath { paths: vec![points], closed: true, fill: Some(fill), ..VectorPath::default() });
    }

    pub fn label(&mut self, at: [f64; 2], text: impl Into<String>, size: f64, anchor: Anchor, ink: Ink) {
        self.marks.push(Mark::Label(Label { at, text: text.into(), size, anchor, ink, vertical: false }));
    }

    /// A rotated label, read from bottom to top and centred on its place.
    pub fn vertical_label(&mut self, at: [f64; 2], text: impl Into<String>, size: f64, ink: Ink) {
        let anchor = Anchor::Middle;
        self.marks.push(Mark::Label(Label { at, text: text.into(), size, anchor, ink, vertical: true }));
    }

    pub fn svg(&self, medium: Medium<'_>) -> String {
        let [width, height] = [self.width, self.height].map(number);
        let title = escape(&self.title);
        let mut text = format!(r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}""#);
        text += &match medium {
            Medium::Page => format!(r#" role="img" aria-label="{title}"><title>{title}</title>"#),
            Medium::Paper(sheet) => {
                let millimetres = |length: f64| number(length * sheet.scale * Sheet::MILLIMETRES);
                let ground =
                    if sheet.transparent { "" } else { r##"<rect width="100%" height="100%" fill="#ffffff"/>"## };
                format!(
                    r#" width="{}mm" height="{}mm" font-family="{}"><title>{title}</title>{ground}"#,
                    millimetres(self.width),
                    millimetres(self.height),
                    escape(&sheet.font.css),
                )
            }
        };
        for mark in &self.marks {
            match mark {
                Mark::Shape(shape) => shape.write_svg(medium, &mut text),
                Mark::Label(label) => label.write_svg(medium, &mut text),
            }
        }
        text + "</svg>"
    }
}

impl VectorPath {
    fn write_svg(&self, medium: Medium<'_>, text: &mut String) {
        *text += "<path d=\"";
        for path in self.paths.iter().filter(|path| !path.is_empty()) {
            for (index, &[x, y]) in path.iter().enumerate() {
                *text += if index == 0 { "M" } else { "L" };
                *text += &format!("{} {}", number(x), number(y));
            }
            if self.closed {
                *text += "Z";
            }
        }
        *text += "\"";
        let opacity = |ink: Ink, name: &str| match ink.opacity() {
            1.0 => String::new(),
            opacity => format!(" {name}-opacity=\"{}\"", number(opacity)),
        };
        *text += &match self.fill {
            Some(ink) => format!(" fill=\"{}\"{}", ink.css(medium), opacity(ink, "fill")),
            None => " fill=\"none\"".into(),
        };
        if let Some((ink, width)) = self.stroke {
            *text += &format!(" stroke=\"{}\" stroke-width=\"{}\"", ink.css(medium), number(width));
            *text += &opacity(ink, "stroke");
            *text += " stroke-linejoin=\"round\"";
            if !self.dash.is_empty() {
                let lengths: Vec<String> = self.dash.iter().map(|&length| number(length)).collect();
                *text += &format!(" stroke-dasharray=\"{}\"", lengths.join(" "));
            }
        }
        *text += &match &self.tip {
            Some(tip) => format!("><title>{}</title></path>", escape(tip)),
            None => "/>".into(),
        };
    }
}

impl Label {
    fn write_svg(&self, medium: Medium<'_>, text: &mut String) {
        let [x, y] = self.at.map(number);
        let anchor = match self.anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let turn = if self.vertical { format!(" transform=\"rotate(-90 {x} {y})\"") } else { String::new() };
        let (size, fill, opacity) = (number(self.size), self.ink.css(medium), number(self.ink.opacity()));
        let _ = write!(
            text,
            "<text x=\"{x}\" y=\"{y}\" font-size=\"{size}\" text-anchor=\"{anchor}\" fill=\"{fill}\" fill-opacity=\"{opacity}\"{turn}>{}</text>",
            escape(&self.text)
        );
    }
}

/// Rounded to hundredths, without trailing zeros.
fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    let short = text.trim_end_matches('0').trim_end_matches('.');
    if short == "-0" { "0".into() } else { short.into() }
}

/// Text escaped for HTML and XML, also inside quotes. Characters that XML does not allow become the replacement
/// character.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            '\t' | '\n' | '\r' => escaped.push(' '),
            '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            character => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The contrast of two colours, from 1 to 21, as the Web Content Accessibility Guidelines define it.
    fn contrast(a: [u8; 3], b: [u8; 3]) -> f64 {
        let linear = |value: u8| {
            let value = f64::from(value) / 255.0;
            if value <= 0.03928 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
        };
        let luminance = |[r, g, b]: [u8; 3]| 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    /// A colour of the style sheet: the first of this name is the light theme's, the second the dark one's.
    fn of_page(name: &str, theme: usize) -> [u8; 3] {
        let text = include_str!("page.css").split(&format!("--{name}: #")).nth(theme + 1).unwrap();
        std::array::from_fn(|channel| u8::from_str_radix(&text[2 * channel..2 * channel + 2], 16).unwrap())
    }

    #[test]
    fn marks_and_text_stand_out_from_the_page() {
        assert_eq!(contrast([0; 3], [255; 3]), 21.0);
        for (theme, palette) in [SERIES, SERIES_ON_DARK].into_iter().enumerate() {
            let paper = of_page("paper", theme);
            for colour in palette {
                assert!(contrast(colour, paper) >= 3.0, "{colour:?} on {paper:?}");
            }
            for (name, behind) in [("ink", "paper"), ("faint", "paper"), ("ink", "tint"), ("faint", "tint")] {
                let (text, behind) = (of_page(name, theme), of_page(behind, theme));
                assert!(contrast(text, behind) >= 4.5, "{name}: {text:?} on {behind:?}");
            }
            // The labels of ticks.
            let (ink, share) = (of_page("ink", theme), super::super::chart::FAINT.opacity());
            let mixed = |channel: usize| share * f64::from(ink[channel]) + (1.0 - share) * f64::from(paper[channel]);
            assert!(contrast(std::array::from_fn(|channel| mixed(channel) as u8), paper) >= 4.5);
        }
    }
}
