"""The index of all filters, against a plain formulation that keeps everything."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from picnn_fast import functional
from picnn_fast.backbones import receptive_field
from picnn_fast.explain import FilterIndex, explain_image, filter_index
from picnn_fast.models import METHODS, make_interpretable

CLASSES = 3


def images(count=11, channels=3, size=32, seed=1):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    return torch.rand(count, channels, size, size, generator=draw), labels


def batches(size, *columns):
    return list(zip(*(column.split(size) for column in columns), strict=True))


def pair(channels=3, filters=6, classes=CLASSES):
    torch.manual_seed(0)
    features = nn.Sequential(
        nn.Conv2d(channels, filters, 5, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    )
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, classes))
    return features, head


def network(method="picnn", backbone=None, classes=CLASSES, **options):
    torch.manual_seed(0)
    if backbone is None:
        backbone = pair(options.pop("channels", 3), options.setdefault("num_filters", 6), classes)
        options["insert_conv"] = False
    return make_interpretable(backbone, method, num_classes=classes, **options).eval()


def plainly(model, pictures, labels, top):
    """Both rankings by sorting lists of everything, one image and one filter at a time."""
    seen = [explain_image(model, picture) for picture in pictures]
    fired, used = [], []
    for i in range(model.num_filters):
        highest, added = [], []
        for m, explained in enumerate(seen):
            chosen = int(explained.logits.argmax())
            fibre = explained.maps.movedim(model.channel_dim - (model.channel_dim > 0), 0)[i]
            highest.append(
                (-fibre.max().item(), m, labels[m].item(), chosen, fibre.argmax().item())
            )
            added.append((-explained.contributions[i].item(), m, labels[m].item(), chosen))
        fired.append(sorted(highest)[:top])
        used.append(sorted(added)[:top])
    return fired, used, all(explained.exact for explained in seen)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", ["small-cnn", "small-resnet"])
def test_of_every_method_it_is_what_sorting_everything_gives(method, backbone):
    given = {"num_filters": 10} if method != "explainer" else {"insert_conv": False}
    model = network(method, backbone, image_channels=3, **given)
    pictures, labels = images()
    index = filter_index(model, batches(4, pictures, labels), top=5)
    fired, used, exact = plainly(model, pictures, labels, 5)
    assert (index.num_images, index.exact) == (11, exact)
    with torch.no_grad():
        maps = model.filter_maps(pictures)
    width = maps.shape[3]
    for i in range(model.num_filters):
        ranking = index.by_activation
        wanted = torch.tensor([-value for value, *_ in fired[i]])
        torch.testing.assert_close(ranking.values[i], wanted, rtol=1e-5, atol=1e-6)
        for place, (value, m, label, chosen, peak) in enumerate(fired[i]):
            if place and abs(value - fired[i][place - 1][0]) < 1e-5:
                continue  # what rounding may turn about
            assert ranking.images[i, place] == m
            assert (ranking.labels[i, place], ranking.predicted[i, place]) == (label, chosen)
            if value < 0:
                assert ranking.positions[i, place].tolist() == [peak // width, peak % width]
        wanted = torch.tensor([-value for value, *_ in used[i]])
        torch.testing.assert_close(index.by_contribution.values[i], wanted, rtol=1e-4, atol=1e-6)
    pooled = maps.flatten(2).mean(2)
    ours = index.mutual_information
    plain = functional.mutual_information(pooled, labels, CLASSES).float()
    varies = pooled.double().std(0, correction=0) > 1e-6 * pooled.mean(0).abs()
    assert torch.equal(index.constant, ~varies)
    plain[:, ~varies] = 0
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-3)
    assert index.estimator == "knn"
    for c in range(CLASSES):
        torch.testing.assert_close(index.class_means[c], pooled[labels == c].mean(0))
        assert index.class_counts[c] == (labels == c).sum()
    ownership = model.ownership()
    for i in range(model.num_filters):
        owned = [] if ownership is None else ownership[:, i].tolist()
        sure = max(owned, default=0) > 0
        assert index.owner[i] == (owned.index(max(owned)) if sure else -1)
        assert index.owned[i] == pytest.approx(max(owned, default=0))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_boxes_are_receptive_fields_of_the_peaks_clipped_to_the_image():
    model = network()
    pictures, labels = images()
    index = filter_index(model, batches(4, pictures, labels), top=4)
    # Kernel 5 at stride 2 and padding 1, then windows of 2: position i sees 4 i - 1 to 4 i + 6.
    assert index.field == receptive_field(model.features, 32)
    assert (index.map_size, index.image_size, index.without_field) == ((7, 7), (32, 32), "")
    for ranking in (index.by_activation, index.by_contribution):
        y, x = ranking.positions.unbind(-1)
        edges = [4 * x - 1, 4 * y - 1, 4 * x + 6, 4 * y + 6]
        assert torch.equal(ranking.boxes, torch.stack(edges, -1).clamp(0, 32).float())
        assert ((ranking.positions >= 0) & (ranking.positions < 7)).all()


def test_used_is_not_strong():
    """A filter that fires most on images of one class, and speaks for another."""
    features = nn.Identity()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
    model = make_interpretable(
        (features, head), "std", num_classes=2, num_filters=2, insert_conv=False
    )
    with torch.no_grad():
        model.head[2].weight.copy_(torch.tensor([[-1.0, 4.0], [1.0, 0.0]]))
    # Filter 0 is strongest in image 0, which the second filter makes a 0.
    pictures = torch.zeros(4, 2, 2, 2)
    pictures[0, 0], pictures[0, 1], pictures[1, 0], pictures[2, 1] = 8, 8, 3, 1
    index = filter_index(model, [(pictures, torch.tensor([0, 1, 0, 0]))], top=2)
    assert index.by_activation.images[0].tolist() == [0, 1]
    assert index.by_activation.values[0].tolist() == [8, 3]
    assert index.by_contribution.images[0].tolist() == [1, 2]
    assert index.by_contribution.values[0].tolist() == [3, 0]
    assert index.by_contribution.predicted[0].tolist() == [1, 0]
    assert index.exact


def _whole_numbers(count, filters=4):
    draw = torch.Generator().manual_seed(5)
    return torch.randint(0, 3, (count, filters, 4, 4), generator=draw).float()


def _identity(filters=4, classes=CLASSES):
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(filters, classes))
    model = make_interpretable(
        (nn.Identity(), head), "std", num_classes=classes, num_filters=filters, insert_conv=False
    )
    with torch.no_grad():
        draw = torch.Generator().manual_seed(6)
        model.head[2].weight.copy_(torch.randint(-2, 3, (classes, filters), generator=draw))
        model.head[2].bias.zero_()
    return model


@pytest.mark.parametrize("size", [1, 2, 5, 7, 12, 20])
def test_equal_values_go_by_the_lower_index_whatever_the_batches(size):
    pictures, labels = _whole_numbers(12), torch.arange(12) % CLASSES
    index = filter_index(_identity(), batches(size, pictures, labels), top=5)
    for i in range(4):
        peaks = pictures[:, i].flatten(1)
        order = sorted(range(12), key=lambda m, peaks=peaks: (-peaks[m].max().item(), m))[:5]
        assert index.by_activation.images[i].tolist() == order
        first = [peaks[m].tolist().index(peaks[m].max().item()) for m in order]
        assert index.by_activation.positions[i].tolist() == [[p // 4, p % 4] for p in first]
    whole = filter_index(_identity(), [(pictures, labels)], top=5)
    for ours, theirs in zip(index.by_contribution, whole.by_contribution, strict=True):
        assert torch.equal(ours, theirs)
    for name in ("class_means", "class_counts", "mutual_information"):
        assert torch.equal(getattr(index, name), getattr(whole, name))
    torch.testing.assert_close(index.correlations, whole.correlations)


def test_where_a_filter_added_most_is_where_it_takes_least_if_its_weight_is_negative():
    model, pictures = _identity(), _whole_numbers(12)
    with torch.no_grad():
        model.head[2].bias[0] = 8  # of the class against which most filters speak
    index = filter_index(model, [(pictures, torch.arange(12) % CLASSES)], top=5)
    ranking, negative = index.by_contribution, 0
    for i in range(4):
        for place in range(5):
            m, chosen = ranking.images[i, place], ranking.predicted[i, place]
            weight = model.head[2].weight[chosen, i].item()
            terms = [weight * value for value in pictures[m, i].flatten().tolist()]
            at = terms.index(max(terms))
            assert ranking.positions[i, place].tolist() == [at // 4, at % 4]
            assert ranking.values[i, place].item() == pytest.approx(sum(terms) / 16)
            negative += weight < 0
    assert negative


def test_fewer_images_than_asked_for_are_all_there():
    pictures, labels = images(5)
    index = filter_index(network(), [(pictures, labels)], top=9)
    assert index.by_activation.images.shape == (6, 5)
    assert [sorted(row) for row in index.by_contribution.images.tolist()] == [list(range(5))] * 6
    assert index.images_of([0, 2]) == list(range(5))


def test_shares_are_of_the_classes_of_the_top_images():
    pictures, labels = images()
    index = filter_index(network(), batches(4, pictures, labels), top=4)
    shares = index.by_activation.shares(CLASSES)
    for i, row in enumerate(index.by_activation.labels.tolist()):
        assert shares[i].tolist() == [row.count(c) / 4 for c in range(CLASSES)]


def test_neighbours_are_those_that_correlate_most_with_means_far_from_0():
    model = _identity(6)
    draw = torch.Generator().manual_seed(3)
    pictures = 1000 + torch.rand(40, 6, 4, 4, generator=draw)
    pictures[:, 4] = pictures[:, 1] + 0.1 * pictures[:, 2]
    pictures[:, 5] = 7  # constant
    index = filter_index(model, batches(9, pictures, torch.arange(40) % CLASSES), neighbours=3)
    pooled = pictures.flatten(2).mean(2).double().numpy()
    plain = np.corrcoef(pooled[:, :5].T)
    for i in range(5):
        others = [(-plain[i, j], j) for j in range(5) if j != i] + [(0.0, 5)]
        wanted = sorted(others)[:3]
        assert index.neighbours[i].tolist() == [j for _, j in wanted]
        assert index.correlations[i].tolist() == pytest.approx([-v for v, _ in wanted], abs=1e-5)
    assert index.correlations[5].tolist() == [0, 0, 0]
    assert index.neighbours[5].tolist() == [0, 1, 2]
    assert index.constant.tolist() == [False] * 5 + [True]
    assert index.mutual_information[:, 5].tolist() == [0, 0, 0]


def test_parts_are_those_under_the_middle_of_the_field_of_the_peak():
    model = network()
    pictures, labels = images()
    masks = torch.rand(11, 2, 32, 32, generator=torch.Generator().manual_seed(8)) < 0.4
    index = filter_index(model, batches(4, pictures, labels, masks), top=6)
    for ranking in (index.by_activation, index.by_contribution):
        for i in range(6):
            for place in range(6):
                row, column = ranking.positions[i, place].tolist()
                y, x = 4 * row + 2, 4 * column + 2  # of the pixel 2.5 lies in
                wanted = masks[ranking.images[i, place], :, y, x].tolist()
                assert ranking.parts[i, place].tolist() == wanted
    assert index.by_activation.parts.any()
    assert filter_index(model, [(pictures, labels)]).by_activation.parts.shape == (6, 9, 0)


class Gated(nn.Module):
    """Looks at the whole image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x):
        maps = self.conv(x)
        return maps * torch.sigmoid(maps.mean((2, 3), keepdim=True))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 8, stride=8)

    def forward(self, x):
        return self.patches(x).flatten(2).movedim(1, 2)


class Mean(nn.Module):
    def forward(self, tokens):
        return tokens.mean(1)


def test_without_receptive_fields_boxes_are_the_image_and_it_says_why():
    features, (_, _, linear) = Gated(), pair()[1]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    model = network(backbone=(features, head), num_filters=6, insert_conv=False)
    pictures, labels = images(5, size=16)
    masks = torch.ones(5, 2, 16, 16, dtype=torch.bool)
    index = filter_index(model, [(pictures, labels, masks)])
    assert index.field is None
    assert "mean" in index.without_field
    assert "\n" not in index.without_field
    assert torch.equal(index.by_activation.boxes, torch.tensor([0.0, 0, 16, 16]).expand(6, 5, 4))
    assert index.by_activation.parts.shape == (6, 5, 0)


def test_tokens_have_a_place_in_their_row_and_the_whole_image():
    model = METHODS["picnn"](
        Tokens(), nn.Sequential(Mean(), nn.Linear(6, CLASSES)), CLASSES, 6, channel_dim=-1
    ).eval()
    pictures, labels = images(7)
    index = filter_index(model, batches(3, pictures, labels), top=3)
    fired, used, _ = plainly(model, pictures, labels, 3)
    assert (index.map_size, index.without_field) == ((1, 16), "the maps are not [B, N, h, w]")
    for i in range(6):
        assert index.by_activation.images[i].tolist() == [m for _, m, *_ in fired[i]]
        assert index.by_activation.positions[i].tolist() == [[0, at] for *_, at in fired[i]]
        assert index.by_contribution.images[i].tolist() == [m for _, m, *_ in used[i]]


@pytest.mark.filterwarnings("ignore:activations")
def test_a_thousand_classes_keep_no_maps_and_few_means():
    classes, filters = 1000, 8
    model = _identity(filters, classes)
    alive, most = [], []

    def look(_, given, maps):
        alive.append(weakref.ref(maps))
        most.append(sum(ref() is not None for ref in alive))

    hook = model.features.register_forward_hook(look)
    draw = torch.Generator().manual_seed(2)

    def stream():
        for _ in range(25):
            yield (
                torch.rand(40, filters, 4, 4, generator=draw),
                torch.randint(classes, (40,), generator=draw),
            )

    index = filter_index(model, stream(), top=3, memory_limit=3 * 40 * filters * 4)
    hook.remove()
    assert max(most) <= 2  # those of this batch, and of the one before it
    assert (index.estimator, index.num_images) == ("histogram", 1000)
    assert index.mutual_information.shape == (classes, filters)
    draw.manual_seed(2)
    columns = list(zip(*stream(), strict=True))
    pooled, labels = torch.cat(columns[0]).flatten(2).mean(2), torch.cat(columns[1])
    plain = functional.mutual_information(pooled, labels, classes, estimator="histogram")
    torch.testing.assert_close(index.mutual_information, plain.float(), rtol=0, atol=1e-6)
    assert torch.equal(index.class_means.isnan().all(1), index.class_counts == 0)


def test_it_is_plain_tensors_and_numbers_and_comes_back_the_same(tmp_path):
    pictures, labels = images()
    index = filter_index(network(), batches(4, pictures, labels))
    torch.save(index.as_dict(), tmp_path / "index.pt")
    again = FilterIndex.from_dict(torch.load(tmp_path / "index.pt", weights_only=True))
    for ours, theirs in zip(_leaves(index), _leaves(again), strict=True):
        same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
        assert same
    assert (index.num_filters, index.num_classes) == (6, CLASSES)


def _leaves(value):
    if isinstance(value, tuple):
        return [leaf for member in value for leaf in _leaves(member)]
    return [value]


def test_it_is_the_same_in_inference_mode_and_leaves_the_generator_alone():
    model = network()
    pictures, labels = images()
    state = torch.get_rng_state()
    outside = filter_index(model.train(), [(pictures, labels)])
    with torch.inference_mode():
        inside = filter_index(model, [(pictures, labels)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(outside.by_contribution.values, inside.by_contribution.values)
    assert not model.training


GOOD = images(5)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"network": nn.Flatten()}, TypeError, "network: got Flatten, want an interpretable"),
        ({"top": 0}, ValueError, "top: got 0"),
        ({"neighbours": 1.0}, TypeError, "neighbours: got float"),
        ({"batches": []}, ValueError, "batches: got 0 images, want at least 3"),
        ({"batches": [GOOD[0]]}, TypeError, "batches: got Tensor, want images, labels"),
        ({"batches": [(GOOD[0][0], GOOD[1])]}, ValueError, r"images: got shape \(3, 32, 32\)"),
        ({"batches": [GOOD, images(2, size=40)]}, ValueError, r"images: .* all of one size"),
        ({"batches": [(GOOD[0], GOOD[1] + 3)]}, ValueError, "labels: got values in"),
        ({"batches": [(*GOOD, GOOD[0])]}, ValueError, r"masks: got torch.float32 .*want bool"),
        (
            {"batches": [(*GOOD, GOOD[0] > 0.5), GOOD]},
            ValueError,
            "masks: got 0 parts, want 3 as in the batches before",
        ),
        ({"batches": [(GOOD[0] * torch.nan, GOOD[1])]}, ValueError, "maps: got NaN or infinity"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, error, text):
    arguments = {"network": network(), "batches": [GOOD], **change}
    with pytest.raises(error, match=text):
        filter_index(**arguments)
