// Loads an exported model and predicts as TorchRec's inference/server.cpp does: libtorch, no Python.
//   predict MODEL REQUESTS PREDICTIONS
// REQUESTS is a file of torch.save with a list of Dict[str, Tensor]; PREDICTIONS becomes one with a list of tensors.
#include <torch/script.h>
#include <torch/serialize.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

int main(int, char** argv) {
  torch::NoGradGuard no_grad;
  auto model = torch::jit::load(argv[1], torch::kCPU);
  std::ifstream in(argv[2], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  c10::List<at::Tensor> predictions;
  const c10::IValue requests = torch::pickle_load(bytes);
  for (const c10::IValue& request : requests.toListRef()) {
    c10::Dict<std::string, at::Tensor> features;
    for (const auto& item : request.toGenericDict()) {
      features.insert(item.key().toStringRef(), item.value().toTensor());
    }
    auto result = model.forward({features}).toGenericDict();
    predictions.push_back(result.at("default").toTensor());
  }
  auto out = torch::pickle_save(predictions);
  std::ofstream(argv[3], std::ios::binary).write(out.data(), out.size());
  std::cout << predictions.size() << " requests\n";
}
